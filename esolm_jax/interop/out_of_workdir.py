"""A workdir's weights → safetensors under the published parameter names."""

import pathlib

import jax
import numpy as np
from ml_collections import ConfigDict

from esolm_jax import assemble, sharding
from esolm_jax.errors import UserError
from esolm_jax.interop import reference, safetensors_file

_PATHS = ("train", "validation", "test", "dir", "tfds_dir", "tokenizer_path")
PREFIX = "backbone."  # of the model in the published checkpoints
WEIGHTS = ("ema", "raw")


def convert(config, workdir: pathlib.Path, target: pathlib.Path, weights: str) -> tuple[int, int]:
    """Writes the latest checkpoint's weights; the config and the tokenizer's identity go with them.

    Returns: the checkpoint's step and the number of parameters.

    Raises:
      UserError: no checkpoint, a model that the published code does not have, or there is a file.
    """
    if target.suffix != ".safetensors":
        raise UserError(f"--to={target}: must end in .safetensors")
    if target.exists():
        raise UserError(f"--to={target}: is already there; delete it, or choose another name")
    if not target.parent.is_dir():
        raise UserError(f"--to={target}: there is no folder {target.parent}")
    reference.check_config(config.model)
    one = ConfigDict({"data": 1, "fsdp": 1, "tensor": 1, "sequence": 1, "devices": 1})
    trained = assemble.load_trained(config, workdir, weights, sharding.make_mesh(one))
    tensors = reference.to_published(trained.params)
    tensors[reference.INV_FREQ] = reference.inv_freq(trained.built.model)
    about = {
        "config": _without_paths(trained.meta["config"]),
        "tokenizer": trained.meta["tokenizer"],
        "step": trained.step,
        "weights": weights,
    }
    named = {PREFIX + name: np.asarray(array) for name, array in tensors.items()}
    safetensors_file.write(target, named, about)
    return trained.step, sum(a.size for a in jax.tree.leaves(trained.params))


def _without_paths(config: dict) -> dict:
    """What lies where on this machine is nobody's business who gets the file."""
    return config | {"data": config["data"] | dict.fromkeys(_PATHS, "")}
