"""The config files of the repository."""

import importlib.util
import pathlib

ROOT = pathlib.Path(__file__).parents[2]
# pretrained.py needs a workdir: see test_pretrained.py.
FILES = sorted(set((ROOT / "configs").rglob("*.py")) - {ROOT / "configs" / "pretrained.py"})


def load(path: pathlib.Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config() if hasattr(module, "get_config") else None
