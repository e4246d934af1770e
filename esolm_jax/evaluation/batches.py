"""Batches of the windows of a split, on a mesh."""

from esolm_jax.data import reader
from esolm_jax.data.manifest import Manifest
from esolm_jax.parallel import sharding


def eval_batches(config, manifest: Manifest, split: str, max_windows: int, mesh):
    """Global batches of config.eval.batch_size windows of a split, each window once."""
    size = config.eval.batch_size
    mine = sharding.local_rows(mesh, size)
    for batch in reader.eval_batches(
        manifest, split, batch_size=size, max_windows=max_windows, rows=mine
    ):
        yield sharding.put_batch(batch, mesh, size)
