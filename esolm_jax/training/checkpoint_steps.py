"""The finished steps of a workdir, their names, and the JSON files in them."""

import json
import math
import pathlib
import re

from esolm_jax.errors import UserError
from esolm_jax.files import regular_file
from esolm_jax.parallel import multihost
from esolm_jax.training import checkpoint_digests
from esolm_jax.training.checkpoint_digests import Damaged

FOLDER = "checkpoints"
METRIC = "nelbo"
LATEST, BEST = "latest", "best"
_MAX_META = 2**28  # bytes
_STEP = re.compile(r"0|[1-9][0-9]{0,17}")


def split_source(source: str) -> tuple[pathlib.Path, str]:
    """Splits DIR or DIR@STEP into the workdir and the step. UserError: a bad STEP."""
    path = pathlib.Path(source).expanduser()
    folder, at, step = str(source).rpartition("@")
    if not at or path.is_dir() or "/" in step:
        return path, LATEST
    check_selector(step, f"{source!r}")
    return pathlib.Path(folder).expanduser(), step


def check_selector(step: str, name: str) -> None:
    """UserError unless `step` is a number, best or latest; `name`: its flag or field."""
    if step not in (LATEST, BEST) and not _STEP.fullmatch(step):
        raise UserError(f"{name}: must be a step (a number), {BEST} or {LATEST}")


def steps_in(workdir) -> list[int]:
    """The finished steps of a workdir, ascending."""
    folder = pathlib.Path(workdir) / FOLDER
    try:
        names = [path.name for path in folder.iterdir() if path.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise UserError(f"{folder}: cannot be read: {error.strerror}") from error
    return sorted(int(name) for name in names if _STEP.fullmatch(name))


def agreed_steps(workdir) -> list[int]:
    """The finished steps as process 0 lists them, in all processes."""
    return json.loads(multihost.from_main(json.dumps(steps_in(workdir))))


def step_folder(workdir, step: int) -> pathlib.Path:
    return pathlib.Path(workdir).resolve() / FOLDER / str(step)


def read_json(path: pathlib.Path):
    """The content of a JSON file of a step. Raises Damaged."""
    try:
        return regular_file.read_json(path, _MAX_META)
    except UserError as error:
        raise Damaged(str(error)) from error


def read_meta_file(folder: pathlib.Path) -> dict:
    """The meta of a step. Raises Damaged, also if it is not one of esolm_jax."""
    path = folder / "meta" / "metadata"
    meta = read_json(path)
    wanted = {"config": dict, "cursor": int, "tokenizer": dict, "version": str}
    for name, kind in wanted.items():
        if not isinstance(meta, dict) or not isinstance(meta.get(name), kind):
            raise Damaged(f"{path}: not the meta of an esolm_jax checkpoint: no {name}")
    return meta


def nelbo(folder: pathlib.Path) -> float | None:
    """The validation NELBO recorded with a step; None if there is none, or it is not finite.

    Raises:
      Damaged: the step has a metric that cannot be read.
    """
    entry = checkpoint_digests.read(folder)
    if entry is None and not (folder / "metrics").exists():
        return None
    if entry is not None and not any(name.startswith("metrics/") for name in entry["files"]):
        return None
    if line := checkpoint_digests.problem(folder, ["metrics"]):
        raise Damaged(line)
    metrics = read_json(folder / "metrics" / "metrics")
    try:
        value = float(metrics[METRIC])
    except (KeyError, TypeError, ValueError) as error:
        raise Damaged(f"{folder}/metrics: holds no {METRIC}") from error
    return value if math.isfinite(value) else None
