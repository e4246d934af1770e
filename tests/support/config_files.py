"""The config files of the repository."""

import importlib.util
import pathlib

ROOT = pathlib.Path(__file__).parents[2]
# These need a workdir: see test_pretrained.py and test_paper_configs.py.
_OF_WORKDIRS = {ROOT / "configs" / name for name in ("pretrained.py", "owt_10k.py")}
FILES = sorted(set((ROOT / "configs").rglob("*.py")) - _OF_WORKDIRS)


def load(path: pathlib.Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config() if hasattr(module, "get_config") else None
