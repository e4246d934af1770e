"""Configs of configs/, as the benchmarks compile and run them."""

import importlib

from ml_collections import ConfigDict

from esolm_jax.family import registry


def read(file: str, argument: str) -> ConfigDict:
    """configs/FILE.py:ARGUMENT."""
    return importlib.import_module(f"configs.{file}").get_config(argument)


def on_one_device(file: str, argument: str, *, length: int, rows: int) -> ConfigDict:
    """The same on one device: `rows` texts of `length` tokens, also of a batch, in one piece."""
    config = read(file, argument)
    config.data.seq_len = length
    config.mesh.update({"data": 1, "fsdp": 1, "tensor": 1, "sequence": 1, "devices": 1})
    config.sample.num_texts = config.train.batch_size = config.eval.batch_size = rows
    config.train.grad_accumulation = 1
    return config


def split_name(name: str) -> tuple[str, float]:
    """NAME[:ALPHA_0] → (objective, alpha_0)."""
    objective, _, alpha_0 = name.partition(":")
    fixed = registry.get(objective).fixed_alpha_0
    return objective, float(alpha_0) if alpha_0 else 0.5 if fixed is None else fixed
