"""Readers: order, epochs, processes, workers, and going on from a cursor."""

import itertools
import json

import ml_collections
import numpy as np
import pytest

from esolm_jax.data.build import prepare
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


def join(shards):
    """Global batches from the batches of every process: row j is row j // P of process j % P."""
    return [
        {k: np.stack([s[k] for s in step], 1).reshape(-1, step[0][k].shape[-1]) for k in step[0]}
        for step in zip(*shards, strict=True)
    ]


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


@pytest.mark.parametrize("processes", [2, 4])
def test_global_batches_do_not_depend_on_processes(manifest, processes):
    whole = take(15, TrainReader(manifest, batch_size=8, seed=1))
    split = [
        take(
            15,
            TrainReader(manifest, batch_size=8, seed=1, process_index=i, process_count=processes),
        )
        for i in range(processes)
    ]
    assert split[0][0]["x"].shape == (8 // processes, 12)
    assert_equal(join(split), whole)


@pytest.mark.parametrize("steps", [0, 1, 6, 7, 13])
def test_resume_is_exact_across_epochs(manifest, steps):
    whole = take(20, TrainReader(manifest, batch_size=8, seed=1))  # an epoch ends in batch 6
    reader = TrainReader(manifest, batch_size=8, seed=1)
    take(steps, reader)
    assert reader.cursor == 8 * steps
    again = TrainReader(manifest, batch_size=8, seed=1, cursor=reader.cursor)
    assert_equal(take(20 - steps, again), whole[steps:])


def test_resume_with_other_batch_size_and_processes(manifest):
    whole = rows(take(15, TrainReader(manifest, batch_size=8, seed=1)))
    shards = [
        take(
            5,
            TrainReader(
                manifest, batch_size=6, seed=1, process_index=i, process_count=2, cursor=40
            ),
        )
        for i in range(2)
    ]
    assert rows(join(shards)) == whole[40:70]


def test_workers_change_nothing(manifest):
    whole = take(9, TrainReader(manifest, batch_size=8, seed=1))
    reader = TrainReader(manifest, batch_size=8, seed=1, workers=2, cursor=16)
    assert_equal(take(7, reader), whole[2:])
    assert reader.cursor == 72
    reader.close()


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
    shards = [
        list(eval_batches(manifest, "validation", batch_size=4, process_index=i, process_count=2))
        for i in range(2)
    ]
    assert_equal(join(shards), batches)


def test_eval_subset_is_evenly_spaced(manifest):
    batches = list(eval_batches(manifest, "train", batch_size=4, max_windows=5))
    names = [name.split()[1] for name in rows(batches) if name]
    assert [int(name.rstrip(b"\x01")) for name in names] == [0, 10, 20, 30, 40]
    counts = [num_windows(manifest, "validation", n) for n in (0, 5, 99)]
    assert counts == [11, 5, 11]
    # Fewer windows than processes: every process still gets its batch.
    (batch,) = eval_batches(manifest, "test", batch_size=4, process_index=3, process_count=4)
    assert batch["x"].shape == (1, 12) and not batch["valid"].any()


def test_unigram_perplexity(manifest):
    def tokens(split):
        batches = list(eval_batches(manifest, split, batch_size=7))
        return np.concatenate([b["x"][b["valid"]] for b in batches])

    counts = np.bincount(tokens("train"), minlength=259) + 1.0
    wanted = np.exp(-np.mean(np.log(counts / counts.sum())[tokens("validation")]))
    assert unigram_perplexity(manifest, "validation") == pytest.approx(wanted)


def test_bad_sizes(manifest):
    with pytest.raises(UserError, match="batch_size=8: must be .* divisible by the 3 processes"):
        TrainReader(manifest, batch_size=8, seed=0, process_count=3)
    with pytest.raises(UserError, match="process_index=2: must lie in 0..1"):
        TrainReader(manifest, batch_size=8, seed=0, process_index=2, process_count=2)
    with pytest.raises(UserError, match="seed=-1"):
        TrainReader(manifest, batch_size=8, seed=-1)
    with pytest.raises(UserError, match="batch_size=0"):
        eval_batches(manifest, "test", batch_size=0)
    with pytest.raises(UserError, match="'tests': allowed are .*did you mean 'test'"):
        eval_batches(manifest, "tests", batch_size=1)
