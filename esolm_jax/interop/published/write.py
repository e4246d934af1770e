"""A workdir's weights → safetensors under the published parameter names."""

import itertools
import pathlib

import jax
from ml_collections import ConfigDict

from esolm_jax.errors import UserError
from esolm_jax.interop import memory, safetensors_file, weight_types
from esolm_jax.interop.published import names as published_names
from esolm_jax.parallel import sharding
from esolm_jax.training import checkpoint_steps, restore

_PATHS = ("train", "validation", "test", "dir", "tfds_dir", "tokenizer_path")
PREFIX = "backbone."  # of the model in the published checkpoints
WEIGHTS = ("ema", "raw")


def convert(
    config,
    workdir: pathlib.Path,
    target: pathlib.Path,
    weights: str,
    step: str = checkpoint_steps.LATEST,
) -> tuple[int, int]:
    """Writes a checkpoint's weights, with the config and the tokenizer's identity as metadata.

    Returns: the checkpoint's step and the number of parameters.

    Raises:
      UserError: no checkpoint, a model without a published counterpart, or the file exists.
    """
    if target.suffix != ".safetensors":
        raise UserError(f"--to={target}: must end in .safetensors")
    if target.exists():
        raise UserError(
            f"--to={target}: must be a new file, because this one exists; delete it or choose "
            "another name"
        )
    if not target.parent.is_dir():
        raise UserError(f"--to={target}: must be in a folder that exists; create {target.parent}")
    published_names.check_config(config.model)
    trained = load(config, workdir, weights, step)
    write(target, trained, weights)
    return trained.step, sum(a.size for a in jax.tree.leaves(trained.params))


def load(
    config, workdir: pathlib.Path, weights: str, step: str = checkpoint_steps.LATEST
) -> restore.TrainedModel:
    """A checkpoint on one device, independent of the devices that trained it.

    Takes the memory of the model and of its largest tensor.
    """
    memory.mmap_large_arrays()
    one = ConfigDict({"data": 1, "fsdp": 1, "tensor": 1, "sequence": 1, "devices": 1})
    trained = restore.load_trained(config, workdir, weights, sharding.make_mesh(one), step)
    memory.clear_jit_caches_and_trim()  # a reference cycle keeps the last restored tensor
    return trained


def write(
    target: pathlib.Path, trained: restore.TrainedModel, weights: str, dtype: str = "float32"
) -> None:
    """Writes the file, tensor by tensor; matrices are rounded to float32, bfloat16 or float16.
    UserError: a weight is too large for the type."""
    inv_freq = published_names.inv_freq(trained.built.model)
    shapes = published_names.published_shapes(trained.params) | {
        published_names.INV_FREQ: inv_freq.shape
    }
    tensors = itertools.chain(
        published_names.published(trained.params), [(published_names.INV_FREQ, inv_freq)]
    )
    dtypes = {n: dtype if len(shape) > 1 else "float32" for n, shape in shapes.items()}
    rounded = ((n, weight_types.rounded(array, dtypes[n], n)) for n, array in tensors)
    safetensors_file.write(
        target,
        {PREFIX + name: shape for name, shape in shapes.items()},
        ((PREFIX + name, array) for name, array in rounded),
        about(trained, weights),
        {PREFIX + name: of_file for name, of_file in dtypes.items()},
    )


def about(trained: restore.TrainedModel, weights: str) -> dict:
    """The origin of the weights, without paths of this machine."""
    return {
        "config": _without_paths(trained.meta["config"]),
        "tokenizer": trained.meta["tokenizer"],
        "step": trained.step,
        "weights": weights,
    }


def _without_paths(config: dict) -> dict:
    """The config without paths of this machine, for privacy."""
    return config | {"data": config["data"] | dict.fromkeys(_PATHS, "")}
