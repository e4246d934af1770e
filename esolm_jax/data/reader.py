"""Readers: prepared windows -> batches {'x': int32 [b, L], 'valid': bool [b, L]}.

A reader makes the rows of each global batch that this process's devices hold (`rows`, ascending; b
of them): see sharding.local_rows. Global batches are independent of the distribution of rows.
Padding has x == pad_id and valid == False.
"""

import contextlib
import itertools
import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from multiprocessing import resource_tracker
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
    """Record -> {'x', 'valid'}; a class, so that it can be pickled for worker processes."""

    def __init__(self, manifest: Manifest):
        self._args = manifest.dtype, manifest.seq_len, manifest.pad_id

    def map(self, record: bytes) -> Batch:
        x, valid = from_record(record, *self._args)
        return {"x": x, "valid": valid}


class _Rows(grain.MapDataset):
    """The rows `rows` of every batch of `batch_size` examples of an endless dataset, from
    example `cursor` on: all rows of the first batch, then all of the second, …"""

    def __init__(self, parent: grain.MapDataset, rows: list[int], batch_size: int, cursor: int):
        super().__init__(parent)
        self._rows, self._batch_size, self._cursor = rows, batch_size, cursor

    def __len__(self) -> int:
        return (len(self._parent) - self._cursor) // self._batch_size * len(self._rows)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        batch, row = divmod(index, len(self._rows))
        return self._parent[self._cursor + batch * self._batch_size + self._rows[row]]


def _die_with_parent(worker: int, workers: int) -> None:
    """Ends this worker process when its parent ends, also if the parent was killed."""
    del worker, workers

    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


@contextlib.contextmanager
def _signals_blocked():
    """Blocks SIGINT and SIGTERM in threads and processes that start within this context. A terminal
    or a scheduler sends them to all processes, but only the trainer may end its workers."""
    resource_tracker.ensure_running()  # the first worker would start it and unblock them
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class TrainReader:
    """Endless shuffled batches of the train split; every epoch is another permutation.

    `cursor` is the global index of the next example (examples handed out so far, over all
    processes and epochs): batch_size more with every batch. A reader made with a cursor continues
    exactly at that example, also with other rows or another number of workers.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        batch_size: int,
        seed: int,
        workers: int = 0,
        rows: Sequence[int] | None = None,
        cursor: int = 0,
    ):
        """`batch_size` is global; without `rows`, all of them are read.

        Raises:
          UserError: a negative number, or rows that are not in the batch.
        """
        rows = _check_rows(batch_size, rows)
        for name, value in (("seed", seed), ("workers", workers), ("cursor", cursor)):
            if value < 0:
                raise UserError(f"{name}={value}: must be at least 0")
        # Grain shuffles epoch e with seed + e; spread the seeds, so that close seeds share no
        # epochs.
        spread = int(np.random.SeedSequence(seed).generate_state(1)[0])
        examples = (
            grain.MapDataset.source(_source(manifest, "train"))
            .shuffle(spread)
            .repeat()
            .map(_Unpack(manifest))
        )
        batches = (
            _Rows(examples, rows, batch_size, cursor)
            .batch(len(rows), drop_remainder=True)
            .to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=PREFETCH))
        )
        if workers:
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()  # Grain hands the flags to its workers
            batches = batches.mp_prefetch(
                grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=PREFETCH),
                worker_init_fn=_die_with_parent,
            )
        # Grain starts its workers with the first batch.
        self._starting = _signals_blocked if workers else contextlib.nullcontext
        with _reading(manifest, "train"), self._starting():
            self._iterator = iter(batches)
        self._manifest = manifest
        self._batch_size = batch_size
        self._cursor = cursor

    @property
    def cursor(self) -> int:
        """Global index of the example after the last batch that was handed out."""
        return self._cursor

    def __iter__(self) -> "TrainReader":
        return self

    def __next__(self) -> Batch:
        # Copied, because workers hand over shared memory, which must not outlive them.
        with _reading(self._manifest, "train"), self._starting():
            batch = {name: np.array(value) for name, value in next(self._iterator).items()}
        self._cursor += self._batch_size
        return batch

    def close(self) -> None:
        """Ends the reading threads and worker processes; without it Grain prints errors at exit."""
        if isinstance(self._iterator, grain.DatasetIterator):
            self._iterator.close()
        self._iterator = iter(())  # must not live until exit


def num_windows(manifest: Manifest, split: str, max_windows: int = 0) -> int:
    """The number of windows of eval_batches."""
    windows = manifest.split(split)["windows"]
    return min(windows, max_windows) if max_windows > 0 else windows


def eval_batches(
    manifest: Manifest,
    split: str,
    *,
    batch_size: int,
    max_windows: int = 0,
    rows: Sequence[int] | None = None,
) -> Iterator[Batch]:
    """Every window of a split once, in order, as batches of static shape.

    `batch_size` is global; without `rows`, all of them are read. max_windows > 0 takes that many
    windows, evenly spaced. The last batch is padded with rows without a valid token. Raises
    UserError (immediately) for a bad split or rows.
    """
    rows = _check_rows(batch_size, rows)
    source = _source(manifest, split)
    count = num_windows(manifest, split, max_windows)

    def batches() -> Iterator[Batch]:
        for b in range(math.ceil(count / batch_size)):
            windows = [b * batch_size + row for row in rows]
            there = [i * len(source) // count for i in windows if i < count]
            x = np.full((len(rows), manifest.seq_len), manifest.pad_id, np.int32)
            valid = np.zeros((len(rows), manifest.seq_len), bool)
            with _reading(manifest, split):
                for row, record in enumerate(source.__getitems__(there) if there else ()):
                    x[row], valid[row] = _unpack(manifest, record)
            yield {"x": x, "valid": valid}

    return batches()


def unigram_perplexity(manifest: Manifest, split: str, max_windows: int = 0) -> float:
    """Perplexity of a split's valid tokens under the train split's counts, add-one smoothed.

    `max_windows` selects the same windows as eval_batches.
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
    with _reading(manifest, split):
        return grain.sources.ArrayRecordDataSource(manifest.shard_paths(split))


@contextlib.contextmanager
def _reading(manifest: Manifest, split: str) -> Iterator[None]:
    """Turns errors of damaged shards into UserErrors; ArrayRecord has checksums of its records."""
    try:
        yield
    except (RuntimeError, ValueError, OSError, EOFError) as error:
        what = " ".join(str(error).split())[:200]
        raise UserError(
            f"{manifest.directory}: the {split} split is damaged: {what}; delete the folder and "
            "prepare again"
        ) from error


def _check_rows(batch_size: int, rows: Sequence[int] | None) -> list[int]:
    """The rows to read, all of them for None."""
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size}: must be at least 1")
    if rows is None:
        return list(range(batch_size))
    rows = list(rows)
    ascending = all(a < b for a, b in itertools.pairwise(rows))
    if not rows or not ascending or not (0 <= rows[0] and rows[-1] < batch_size):
        raise UserError(f"rows={rows}: must be one or more of 0..{batch_size - 1}, ascending")
    return rows
