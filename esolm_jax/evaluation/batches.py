"""Batches of the windows of a split, on a mesh."""

import numpy as np

from esolm_jax.data import reader
from esolm_jax.data.manifest import Manifest
from esolm_jax.parallel import sharding


def eval_batches(config, manifest: Manifest, split: str, max_windows: int, mesh):
    """Global batches of config.eval.batch_size windows of a split, each window once.

    If the devices that shard rows do not divide the batch size, rows without a valid token follow.
    """
    size = config.eval.batch_size
    padded = sharding.padded_rows(mesh, size)
    mine = sharding.local_rows(mesh, padded)
    real = [row for row in mine if row < size]
    for batch in reader.eval_batches(
        manifest, split, batch_size=size, max_windows=max_windows, rows=real or [0]
    ):
        if len(real) < len(mine):
            batch = _padded(batch, len(real), len(mine), manifest.pad_id)
        yield sharding.put_batch(batch, mesh, padded)


def _padded(batch: dict, num_real: int, rows: int, pad_id: int) -> dict:
    """The first `num_real` rows of a batch, followed by padding: arrays [rows, L]."""
    length = batch["x"].shape[1]
    x = np.full((rows, length), pad_id, np.int32)
    valid = np.zeros((rows, length), bool)
    x[:num_real], valid[:num_real] = batch["x"][:num_real], batch["valid"][:num_real]
    return {"x": x, "valid": valid}
