"""The meta of a checkpoint: its config and other metadata that is read before arrays.

A command without --config takes the config of a checkpoint, and later the weights of one. They can
be of different steps: see check_config_is_of.
"""

import pathlib

from ml_collections import ConfigDict

from esolm_jax import config as config_lib
from esolm_jax.errors import UserError
from esolm_jax.training import checkpoint_digests, checkpoint_selection, checkpoint_steps
from esolm_jax.training.checkpoint_digests import Damaged
from esolm_jax.training.checkpoint_steps import LATEST

_config_read: dict[pathlib.Path, dict] = {}  # by workdir: the saved config of this command
_OF_THE_RUN = ("train.", "optimizer.", "mesh.", "distributed.", "init_from", "data.workers")


def _check_meta_alone(meta: dict) -> list[str]:
    del meta
    return []


def read_meta(workdir, step: str = LATEST) -> dict:
    """The meta of a checkpoint ("latest", "best" or a number). UserError if there is none."""
    meta, _ = checkpoint_selection.read_intact(
        workdir, step, _check_meta_alone, lambda found: found.meta
    )
    return meta


def saved_config(workdir, step: str = LATEST) -> ConfigDict:
    """The resolved config of a checkpoint, locked."""
    return config_in(read_meta(workdir, step), workdir)


def config_in(meta: dict, workdir="the checkpoint") -> ConfigDict:
    """The config in the meta of a checkpoint, locked. UserError: not of a version that we read."""
    return config_lib.from_saved(meta["config"], str(workdir))


def begin_command() -> None:
    """Clears the state of an earlier command in this process."""
    _config_read.clear()
    config_lib.begin_command()
    checkpoint_selection.forget_what_was_said()


def config_of_command(workdir, step: str) -> ConfigDict:
    """The saved config for a command without --config; see check_config_is_of."""
    meta = read_meta(workdir, step)
    _config_read[pathlib.Path(workdir).resolve()] = meta["config"]
    return config_in(meta, workdir)


def check_config_is_of(workdir, meta: dict) -> None:
    """UserError unless the command's saved config equals that of the step of the weights.

    The two can come from different steps if the first step is deleted or damaged. Their settings
    differ if training was resumed with other settings in between.
    """
    read = _config_read.get(pathlib.Path(workdir).resolve())
    if read is None or read == meta["config"]:
        return
    have, want = (
        config_lib.flat(config_lib.from_saved(saved, str(workdir)))
        for saved in (read, meta["config"])
    )
    for name in sorted(have):
        if have[name] != want[name] and not name.startswith(_OF_THE_RUN):
            raise UserError(
                f"--workdir={workdir}: the config was read from one checkpoint and the weights "
                f"from another with other settings (config.{name}="
                f"{want[name]!r}, not {have[name]!r}); name one with --step=N"
            )


def digest_of(workdir, step: int) -> str | None:
    """The SHA-256 of the list of digests of a step's files; None for a step without digests.

    Raises:
      UserError: there is no such step, or its digests are damaged or of an unsupported algorithm.
    """
    folder = checkpoint_steps.step_folder(workdir, step)
    try:
        entry = checkpoint_digests.read(folder)
    except Damaged as error:
        raise UserError(f"{error}: step {step} is damaged") from error
    return None if entry is None else entry["digest"]


def items_of(meta: dict) -> list[str]:
    """The items with arrays of a checkpoint with this meta."""
    return ["params"] if meta.get("only_weights") else ["params", "ema", "optimizer"]


def weights_item(which: str, meta: dict) -> str:
    """The item with the weights "ema" or "raw". A pretrained model has one set, in "params"."""
    return "ema" if which == "ema" and not meta.get("only_weights") else "params"
