"""Reads the wanted step of a workdir, or another intact one in place of a damaged one.

If the best or the latest is damaged, the next best or next older intact step is read instead. While
a `train` runs, it deletes old steps. So a step that disappears while it is read is not damaged; the
reader lists the steps again.
"""

import dataclasses
import json
import pathlib
import shutil
import sys
import time
from collections.abc import Callable
from typing import TypeVar

from esolm_jax.errors import UserError
from esolm_jax.parallel import distributed, multihost
from esolm_jax.training import checkpoint_digests
from esolm_jax.training.checkpoint_digests import Damaged
from esolm_jax.training.checkpoint_steps import (
    BEST,
    FOLDER,
    LATEST,
    agreed_steps,
    nelbo,
    read_meta_file,
    step_folder,
    steps_in,
)

T = TypeVar("T")

DAMAGED_FOLDER = "damaged_checkpoints"  # in the workdir: damaged steps that a resumed run moved
_ATTEMPTS = 100  # to read while a writer deletes steps
_DELETION = 0.2  # seconds; a step is deleted file by file
_SLOW = 6 * 3600  # seconds to read on the slowest host; peers.py detects a dead one sooner

_said: set[str] = set()


def say(line: str) -> None:
    """Prints a line on stderr, once and in process 0 only."""
    if line not in _said and distributed.is_main():
        print(line, file=sys.stderr, flush=True)
    _said.add(line)


def forget_what_was_said() -> None:
    _said.clear()


@dataclasses.dataclass(frozen=True)
class Step:
    """A step whose meta is intact; `verified`: it has digests."""

    number: int
    folder: pathlib.Path
    meta: dict
    verified: bool


def _by_preference(workdir, wanted: str, steps: list[int], refused: dict[int, str]) -> list[int]:
    """The steps to try, in order; adds steps with damaged metrics to `refused`."""
    if wanted == LATEST:
        return [step for step in reversed(steps) if step not in refused]
    if wanted != BEST:
        return [int(wanted)] if int(wanted) in steps else []
    ranked = []
    for step in steps:
        try:
            value = nelbo(step_folder(workdir, step)) if step not in refused else None
        except Damaged as error:
            time.sleep(_DELETION)
            if step in steps_in(workdir):
                refused[step] = str(error)
            continue
        if value is not None:
            ranked.append((value, step))
    return [step for _, step in sorted(ranked)]


def _listed(steps: list[int]) -> str:
    return ", ".join(map(str, steps)) if steps else "none"


def _no_step(workdir, wanted: str, steps: list[int], refused: dict[int, str]) -> UserError:
    folder = pathlib.Path(workdir) / FOLDER
    if not folder.is_dir():
        return UserError(
            f"--workdir={workdir}: no checkpoints here (there is no {FOLDER}/ in it); "
            "run `python -m esolm_jax.train` first"
        )
    if not steps:
        return UserError(f"--workdir={workdir}: {FOLDER}/ holds no finished checkpoint")
    if refused:
        first = refused[max(refused)]
        return UserError(
            f"{first}; none of the checkpoints in {folder} is intact (steps {_listed(steps)}): "
            "restore a copy, or start again in another --workdir"
        )
    if wanted == BEST:
        return UserError(
            f"{folder}: no step has a recorded validation NELBO, so none is the best; "
            f"steps there: {_listed(steps)}"
        )
    return UserError(f"{folder}: there is no step {wanted}; steps there: {_listed(steps)}")


def _check(folder: pathlib.Path, items) -> str | None:
    """The first problem with these items that any process finds."""
    try:
        line = checkpoint_digests.problem(
            folder,
            items,
            process=distributed.process_index() if distributed.is_started() else 0,
            processes=distributed.process_count() if distributed.is_started() else 1,
        )
    except Damaged as error:
        line = str(error)
    return _agreed(line)


def _agreed(line: str | None) -> str | None:
    """The first line that is not None, over all processes."""
    everybody = multihost.gather(line or "", timeout=_SLOW)
    return next((said for said in everybody if said), None)


def _try(workdir, number: int, items: Callable[[dict], list[str]], read: Callable):
    """(None, the result of `read`), or (the damage to the step, None)."""
    folder = step_folder(workdir, number)
    if line := _check(folder, ["meta"]):
        return line, None
    meta = error = result = None
    try:
        meta = read_meta_file(folder)
    except Damaged as damage:
        error = str(damage)
    if line := _agreed(error):
        return line, None
    if line := _check(folder, items(meta)):
        return line, None
    step = Step(number, folder, meta, (folder / checkpoint_digests.FILE).exists())
    try:
        result = read(step)
    except Damaged as damage:
        error = str(damage)
    if line := _agreed(error):
        return line, None
    return None, result


def _agreed_order(
    workdir, wanted: str, steps: list[int], refused: dict[int, str]
) -> tuple[list[int], dict[int, str]]:
    """The steps to try and the refused ones, as process 0 sees them, in all processes."""
    refused = dict(refused)
    order = _by_preference(workdir, wanted, steps, refused) if distributed.is_main() else []
    order, named = json.loads(multihost.from_main(json.dumps([order, list(refused.items())])))
    return [step for step in order if step not in dict(named)], dict(map(tuple, named))


def read_intact(
    workdir,
    wanted: str,
    items: Callable[[dict], list[str]],
    read: Callable[[Step], T],
) -> tuple[T, dict[int, str]]:
    """The result of `read` for the wanted step, or for the next intact one if it is damaged.

    Args:
      wanted: "latest", "best" or a number; another step never replaces a number.
      items: from the step's meta to the items that `read` needs; they are verified first.
      read: may raise Damaged.

    Returns:
      (the result, {step: damage} of the skipped steps).

    Raises:
      UserError: there is no such step, or none is intact.
    """
    refused: dict[int, str] = {}
    is_number = wanted not in (LATEST, BEST)
    attempts = _ATTEMPTS
    while attempts:
        steps = agreed_steps(workdir)
        refused = {step: line for step, line in refused.items() if step in steps}
        candidates, refused = _agreed_order(workdir, wanted, steps, refused)
        if not candidates:
            raise _no_step(workdir, wanted, steps, refused)
        number = candidates[0]
        line, result = _try(workdir, number, items, read)
        if line is None:
            still_there = agreed_steps(workdir) if refused else []
            refused = {step: line for step, line in refused.items() if step in still_there}
            for step, damage in sorted(refused.items(), reverse=True):
                say(f"{damage}: step {step} is damaged; using step {number} instead")
            return result, refused
        if _vanished(workdir, number, steps):
            attempts -= 1
            continue
        if is_number:
            raise UserError(
                f"{line}: step {number} is damaged; steps there: {_listed(steps)} "
                f"(--step={LATEST} takes the newest intact one)"
            )
        refused[number] = line
    raise UserError(
        f"{pathlib.Path(workdir) / FOLDER}: steps were deleted faster than they could be read "
        f"({_ATTEMPTS} attempts); try again, or raise config.train.keep_last of the running train"
    )


def _vanished(workdir, number: int, before: list[int]) -> bool:
    """Whether a writer has deleted the step, or finished a newer one and is about to."""
    now = agreed_steps(workdir)
    if number in now and now[-1] == before[-1]:
        time.sleep(_DELETION)
        now = agreed_steps(workdir)
    return number not in now or now[-1] > before[-1]


def agree_on(damaged: dict[int, str]) -> dict[int, str]:
    """Steps that any process has found damaged."""
    everybody = [json.loads(said) for said in multihost.gather(json.dumps(damaged))]
    return {int(step): line for said in everybody for step, line in said.items()}


def set_aside(workdir, damaged: dict[int, str]) -> None:
    """Moves damaged steps to DAMAGED_FOLDER, so that a run can write these steps again."""
    workdir = pathlib.Path(workdir).resolve()
    for step in sorted(damaged):
        target = workdir / DAMAGED_FOLDER / str(step)
        number = 2
        while target.exists():
            target, number = target.with_name(f"{step}.{number}"), number + 1
        if distributed.is_main():
            target.parent.mkdir(exist_ok=True)
            shutil.move(workdir / FOLDER / str(step), target)
        say(f"{workdir / FOLDER / str(step)}: moved to {target}")
    if damaged:
        multihost.gather("")  # a barrier: all steps are moved
