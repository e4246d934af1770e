"""Readers: prepared windows -> batches {'x': int32 [b, L], 'valid': bool [b, L]}.

b is the rows of this process, batch_size / process_count. Row j of a global batch is row
j // process_count on process j % process_count, so the global batches are the same for any
process_count. Padding has x == pad_id and valid == False.
"""

import math
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np
from absl import flags

from esolm_jax.data.manifest import Manifest
from esolm_jax.data.windows import from_record
from esolm_jax.errors import UserError

Batch = dict[str, np.ndarray]
PREFETCH = 4  # batches


class _Unpack(grain.transforms.Map):
    """Record -> {'x', 'valid'}; a class, so that it can travel to worker processes."""

    def __init__(self, manifest: Manifest):
        self._args = manifest.dtype, manifest.seq_len, manifest.pad_id

    def map(self, record: bytes) -> Batch:
        x, valid = from_record(record, *self._args)
        return {"x": x, "valid": valid}


class TrainReader:
    """Endless shuffled batches of the train split; every epoch is another permutation.

    `cursor` is the global index of the next example (examples handed out so far, over all
    processes and epochs). A reader made with a cursor goes on exactly where that one stood,
    also with another process_count or number of workers.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        batch_size: int,
        seed: int,
        workers: int = 0,
        process_index: int = 0,
        process_count: int = 1,
        cursor: int = 0,
    ):
        """`batch_size` is global. Raises UserError for sizes that do not fit together."""
        _check_sizes(batch_size, process_index, process_count)
        for name, value in (("seed", seed), ("workers", workers), ("cursor", cursor)):
            if value < 0:
                raise UserError(f"{name}={value}: must not be negative")
        # Grain's epoch e is shuffled with seed + e: spread the seeds, or neighbours share epochs.
        spread = int(np.random.SeedSequence(seed).generate_state(1)[0])
        dataset = (
            grain.MapDataset.source(_source(manifest, "train"))
            .shuffle(spread)
            .repeat()
            .map(_Unpack(manifest))
        )
        multiprocessing = None
        if workers:
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()  # Grain hands the flags to its workers
            multiprocessing = grain.MultiprocessingOptions(
                num_workers=workers, per_worker_buffer_size=PREFETCH
            )
        self._iterator = iter(
            grain.experimental.ElasticIterator(
                dataset,
                batch_size,
                grain.sharding.ShardOptions(process_index, process_count),
                read_options=grain.ReadOptions(num_threads=2, prefetch_buffer_size=PREFETCH),
                multiprocessing_options=multiprocessing,
            )
        )
        self._iterator.set_state({"global_next_index": cursor})

    @property
    def cursor(self) -> int:
        """Global index of the example after the last batch that was handed out."""
        return self._iterator.get_state()["global_next_index"]

    def __iter__(self) -> "TrainReader":
        return self

    def __next__(self) -> Batch:
        # Copied, because workers hand over shared memory, which must not outlive them.
        return {name: np.array(value) for name, value in next(self._iterator).items()}

    def close(self) -> None:
        """Ends the reading threads and worker processes; without it Grain complains at exit."""
        # Setting a state closes what runs and forgets it; close() alone keeps it until exit.
        self._iterator.set_state(self._iterator.get_state())


def num_windows(manifest: Manifest, split: str, max_windows: int = 0) -> int:
    """How many windows eval_batches goes through."""
    windows = manifest.split(split)["windows"]
    return min(windows, max_windows) if max_windows > 0 else windows


def eval_batches(
    manifest: Manifest,
    split: str,
    *,
    batch_size: int,
    max_windows: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Every window of a split once, in order, as batches of static shape.

    max_windows > 0 takes that many, evenly spaced. The last batch is filled up with rows that
    have no valid token. Raises UserError (at once) for a bad split or sizes.
    """
    _check_sizes(batch_size, process_index, process_count)
    source = _source(manifest, split)
    count = num_windows(manifest, split, max_windows)
    local = batch_size // process_count

    def batches() -> Iterator[Batch]:
        for b in range(math.ceil(count / batch_size)):
            mine = range(b * batch_size, min((b + 1) * batch_size, count))
            rows = [i * len(source) // count for i in mine[process_index::process_count]]
            x = np.full((local, manifest.seq_len), manifest.pad_id, np.int32)
            valid = np.zeros((local, manifest.seq_len), bool)
            for row, record in enumerate(source.__getitems__(rows) if rows else ()):
                x[row], valid[row] = _unpack(manifest, record)
            yield {"x": x, "valid": valid}

    return batches()


def unigram_perplexity(manifest: Manifest, split: str, max_windows: int = 0) -> float:
    """Perplexity of a split's valid tokens under the train split's counts, add-one smoothed.

    `max_windows` takes the same part of the split as eval_batches does.
    """
    seen = manifest.unigram_counts()
    counts = seen + 1
    nats = np.log(counts.sum()) - np.log(counts)
    if split == "train" and not max_windows:
        return float(np.exp((seen * nats).sum() / seen.sum()))
    total = tokens = 0
    for batch in eval_batches(manifest, split, batch_size=256, max_windows=max_windows):
        valid = batch["x"][batch["valid"]]
        total, tokens = total + nats[valid].sum(), tokens + len(valid)
    return float(np.exp(total / tokens))


def _unpack(manifest: Manifest, record: bytes) -> tuple[np.ndarray, np.ndarray]:
    return from_record(record, manifest.dtype, manifest.seq_len, manifest.pad_id)


def _source(manifest: Manifest, split: str) -> Any:
    return grain.sources.ArrayRecordDataSource(manifest.shard_paths(split))


def _check_sizes(batch_size: int, process_index: int, process_count: int) -> None:
    if batch_size < 1 or batch_size % process_count:
        raise UserError(
            f"batch_size={batch_size}: must be positive, and divisible by the "
            f"{process_count} processes"
        )
    if not 0 <= process_index < process_count:
        raise UserError(f"process_index={process_index}: must lie in 0..{process_count - 1}")
