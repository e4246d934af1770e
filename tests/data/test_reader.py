"""Readers: order, epochs, processes, workers, and going on from a cursor."""

import itertools
import json
import multiprocessing
import os
import pathlib
import re
import signal
import subprocess
import sys

import ml_collections
import numpy as np
import pytest

from esolm_jax.data.build import prepare
from esolm_jax.data.later_fields import BEFORE
from esolm_jax.data.reader import TrainReader, eval_batches, num_windows, unigram_perplexity
from esolm_jax.errors import UserError


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    """50 train windows, one document each (so every window is another), L = 12."""
    directory = tmp_path_factory.mktemp("reader")
    paths = {}
    for split, count in (("train", 50), ("validation", 11), ("test", 1)):
        paths[split] = directory / f"{split}.jsonl"
        rows = [json.dumps({"text": f"{split[0]} {i} " + "z" * (i % 9)}) for i in range(count)]
        paths[split].write_text("\n".join(rows))
    data = dict(
        source="text",
        **{s: str(p) for s, p in paths.items()},
        holdout=0.1,
        text_field="text",
        tfds_dir="",
        **BEFORE,
        seq_len=12,
        packing="pad",
        tokenizer="bytes",
        tokenizer_path="",
        vocab_size=0,
    )
    config = ml_collections.ConfigDict({"seed": 0, "data": data})
    return prepare(config, directory / "data", progress=False)


def take(count, reader):
    return list(itertools.islice(reader, count))


def rows(batches):
    return [
        bytes(x[v].astype(np.uint8))
        for b in batches
        for x, v in zip(b["x"], b["valid"], strict=True)
    ]


# Ways to deal the rows of a batch of 8 out to processes; the last two share rows or leave holes.
PARTITIONS = [
    [[0, 1, 2, 3], [4, 5, 6, 7]],
    [[0, 2, 4, 6], [1, 3, 5, 7]],
    [[0], [1, 5, 7], [2, 3, 4, 6]],
    [[0, 1, 4, 5], [2, 3, 6, 7], [0, 1, 4, 5], [2, 3, 6, 7]],
]


def join(shards, partition):
    """Global batches from the batches that every process read of its rows."""
    whole = []
    for step in zip(*shards, strict=True):
        size = 1 + max(row for rows in partition for row in rows)
        batch = {k: np.zeros((size, *v.shape[1:]), v.dtype) for k, v in step[0].items()}
        for part, rows in zip(step, partition, strict=True):
            for key, value in part.items():
                assert len(value) == len(rows)
                batch[key][rows] = value
        whole.append(batch)
    return whole


def assert_equal(one, two):
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        for key in ("x", "valid"):
            assert a[key].dtype == b[key].dtype
            np.testing.assert_array_equal(a[key], b[key])


def test_batches_and_epochs(manifest):
    reader = TrainReader(manifest, batch_size=5, seed=3)
    batches = take(20, reader)
    for batch in batches:
        assert batch["x"].shape == batch["valid"].shape == (5, 12)
        assert batch["x"].dtype == np.int32 and batch["valid"].dtype == bool
        assert (batch["x"][~batch["valid"]] == manifest.pad_id).all()
    first, second = rows(batches[:10]), rows(batches[10:])
    assert len(set(first)) == 50 and set(first) == set(second) and first != second
    assert first != sorted(first)
    assert reader.cursor == 100


def test_seeds(manifest):
    read = lambda seed, n: take(n, TrainReader(manifest, batch_size=50, seed=seed))  # noqa: E731
    assert_equal(read(0, 2), read(0, 2))
    # Epoch 1 of seed 0 is not epoch 0 of seed 1.
    assert rows(read(0, 2)[1:]) != rows(read(1, 1)) != rows(read(0, 1))
    read(2**40, 1)


@pytest.mark.parametrize("partition", PARTITIONS)
def test_global_batches_do_not_depend_on_who_reads_which_rows(manifest, partition):
    whole = take(15, TrainReader(manifest, batch_size=8, seed=1))
    readers = [TrainReader(manifest, batch_size=8, seed=1, rows=rows) for rows in partition]
    shards = [take(15, reader) for reader in readers]
    assert_equal(join(shards, partition), whole)
    assert [reader.cursor for reader in readers] == [15 * 8] * len(partition)


@pytest.mark.parametrize("steps", [0, 1, 6, 7, 13])
def test_resume_is_exact_across_epochs(manifest, steps):
    whole = take(20, TrainReader(manifest, batch_size=8, seed=1))  # an epoch ends in batch 6
    reader = TrainReader(manifest, batch_size=8, seed=1)
    take(steps, reader)
    assert reader.cursor == 8 * steps
    again = TrainReader(manifest, batch_size=8, seed=1, cursor=reader.cursor)
    assert_equal(take(20 - steps, again), whole[steps:])


@pytest.mark.parametrize("partition", PARTITIONS)
def test_resume_with_another_partition(manifest, partition):
    whole = take(15, TrainReader(manifest, batch_size=8, seed=1))
    first = TrainReader(manifest, batch_size=8, seed=1, rows=[0, 1, 2, 3])
    take(5, first)
    shards = [
        take(10, TrainReader(manifest, batch_size=8, seed=1, rows=rows, cursor=first.cursor))
        for rows in partition
    ]
    assert_equal(join(shards, partition), whole[5:])


def test_resume_with_another_batch_size(manifest):
    whole = rows(take(15, TrainReader(manifest, batch_size=8, seed=1)))
    partition = [[0, 3], [1, 2, 4, 5]]
    shards = [
        take(5, TrainReader(manifest, batch_size=6, seed=1, rows=part, cursor=40))
        for part in partition
    ]
    assert rows(join(shards, partition)) == whole[40:70]


def blocked_signals(pid: int) -> set[int]:
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    mask = int(re.search(r"^SigBlk:\s*(\w+)$", status, re.MULTILINE)[1], 16)
    return {number for number in range(1, 65) if mask >> (number - 1) & 1}


def test_workers_change_nothing(manifest):
    whole = take(9, TrainReader(manifest, batch_size=8, seed=1))
    part = [1, 2, 6]
    reader = TrainReader(manifest, batch_size=8, seed=1, workers=2, rows=part, cursor=16)
    found = take(1, reader)
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for worker in workers:  # a terminal sends SIGINT to all; the run stops after its step
        assert {signal.SIGINT, signal.SIGTERM} <= blocked_signals(worker.pid)
    found += take(6, reader)
    assert_equal(found, [{k: v[part] for k, v in b.items()} for b in whole[2:]])
    assert reader.cursor == 72
    reader.close()
    reader.close()
    assert list(reader) == []


def test_workers_die_with_a_killed_parent(manifest, tmp_path):
    """They hold its stdout, so the pipe ends with the last of them."""
    script = tmp_path / "killed.py"
    script.write_text(f"""
import os, signal
from esolm_jax.data.manifest import load_manifest
from esolm_jax.data.reader import TrainReader
if __name__ == "__main__":
    manifest = load_manifest({str(manifest.directory)!r})
    reader = TrainReader(manifest, batch_size=8, seed=0, workers=2)
    print(next(reader)["x"].shape, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
""")
    done = subprocess.run(
        [sys.executable, script],
        env=os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[2])},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        timeout=100,
    )
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, b"(8, 12)\n")


def test_epoch_smaller_than_a_batch(manifest):
    (batch,) = take(1, TrainReader(manifest, batch_size=120, seed=0))
    names = rows([batch])
    assert len(names) == 120 and set(names[:50]) == set(names[50:100])


def test_eval_reads_every_window_once(manifest):
    batches = list(eval_batches(manifest, "validation", batch_size=4))
    assert [b["x"].shape for b in batches] == [(4, 12)] * 3
    names = [name for name in rows(batches) if name]
    assert [name.split()[1].strip(b"\x01") for name in names] == [b"%d" % i for i in range(11)]
    assert not batches[-1]["valid"][3].any() and (batches[-1]["x"][3] == manifest.pad_id).all()


@pytest.mark.parametrize("partition", PARTITIONS)
def test_eval_batches_do_not_depend_on_who_reads_which_rows(manifest, partition):
    whole = list(eval_batches(manifest, "validation", batch_size=8))
    shards = [
        list(eval_batches(manifest, "validation", batch_size=8, rows=rows)) for rows in partition
    ]
    assert_equal(join(shards, partition), whole)


def test_eval_subset_is_evenly_spaced(manifest):
    batches = list(eval_batches(manifest, "train", batch_size=4, max_windows=5))
    names = [name.split()[1] for name in rows(batches) if name]
    assert [int(name.rstrip(b"\x01")) for name in names] == [0, 10, 20, 30, 40]
    counts = [num_windows(manifest, "validation", n) for n in (0, 5, 99)]
    assert counts == [11, 5, 11]
    # Fewer windows than processes: every process still gets its batch.
    (batch,) = eval_batches(manifest, "test", batch_size=4, rows=[3])
    assert batch["x"].shape == (1, 12) and not batch["valid"].any()


def test_unigram_perplexity(manifest):
    def tokens(split):
        batches = list(eval_batches(manifest, split, batch_size=7))
        return np.concatenate([b["x"][b["valid"]] for b in batches])

    counts = np.bincount(tokens("train"), minlength=259) + 1.0
    wanted = np.exp(-np.mean(np.log(counts / counts.sum())[tokens("validation")]))
    assert unigram_perplexity(manifest, "validation") == pytest.approx(wanted)


def test_bad_sizes(manifest):
    for bad in ([], [1, 0], [2, 2], [7, 8], [-1, 0]):
        with pytest.raises(UserError, match=r"rows=\[.*\]: must be one or more of 0..7, ascending"):
            TrainReader(manifest, batch_size=8, seed=0, rows=bad)
        with pytest.raises(UserError, match="rows="):
            eval_batches(manifest, "test", batch_size=8, rows=bad)
    with pytest.raises(UserError, match="seed=-1"):
        TrainReader(manifest, batch_size=8, seed=-1)
    with pytest.raises(UserError, match="batch_size=0"):
        eval_batches(manifest, "test", batch_size=0)
    with pytest.raises(UserError, match="'tests': must be one of .*did you mean 'test'"):
        eval_batches(manifest, "tests", batch_size=1)
