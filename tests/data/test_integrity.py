"""Prepared data: damage of any file is one line before training or evaluation, or as it is read."""

import json
import pathlib
import random
import shutil

import numpy as np
import pytest
import tiny_run

from esolm_jax.data import integrity
from esolm_jax.data.manifest import MANIFEST_FILE, UNIGRAM_FILE, load_data, load_manifest
from esolm_jax.data.reader import TrainReader, eval_batches, unigram_perplexity
from esolm_jax.errors import UserError

pytestmark = pytest.mark.fast_compile


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    fields = tiny_run.write_data(tmp_path_factory.mktemp("prepared"))
    return pathlib.Path(fields["data.dir"]), tiny_run.make_config(fields)


@pytest.fixture
def data(prepared, tmp_path):
    return pathlib.Path(shutil.copytree(prepared[0], tmp_path / "data"))


def without_digests(folder: pathlib.Path) -> None:
    """As commit 947f88e wrote it."""
    path = folder / MANIFEST_FILE
    entries = json.loads(path.read_text())
    del entries["files"], entries[integrity.DIGEST]
    path.write_text(json.dumps(entries, indent=2))


def flip(path: pathlib.Path, position: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


def one_line(error) -> str:
    (line,) = str(error.value).splitlines()
    return line


def test_the_manifest_has_digests_of_the_small_files(data):
    assert set(load_manifest(data).files) == {"tokenizer.bytes", UNIGRAM_FILE}


@pytest.mark.parametrize("name", [MANIFEST_FILE, UNIGRAM_FILE, "tokenizer.bytes"])
def test_every_flipped_bit_of_a_small_file_is_noticed(data, name):
    good = (data / name).read_bytes()
    rng = random.Random(0)
    for position in rng.sample(range(len(good)), min(60, len(good))):
        flip(data / name, position, rng.randrange(8))
        with pytest.raises(UserError) as error:
            load_manifest(data)
        assert str(data) in one_line(error)
        (data / name).write_bytes(good)
    load_manifest(data)


def remove(path):
    path.unlink()


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


def garbage(path):
    path.write_bytes(random.Random(0).randbytes(path.stat().st_size))


def folder_instead(path):
    path.unlink()
    path.mkdir()


DAMAGES = [remove, truncate, empty, garbage, folder_instead]


@pytest.mark.parametrize("digests", [True, False])
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", [MANIFEST_FILE, UNIGRAM_FILE])
def test_damaged_small_files_are_noticed_when_data_are_loaded(
    data, prepared, name, damage, digests
):
    if not digests:
        without_digests(data)
    damage(data / name)
    config = tiny_run.make_config({})
    config.update(prepared[1])
    config.data.dir = str(data)
    with pytest.raises(UserError) as error:
        load_data(config, data)
    assert str(data) in one_line(error)


@pytest.mark.parametrize(
    "counts",
    [
        np.zeros(259, np.int64), np.full(259, 3, np.int64), np.zeros(258, np.int64),
        np.zeros(259, np.float64), np.zeros((259, 1), np.int64), np.array([{}], object),
    ],
)  # fmt: skip
def test_counts_that_are_none_are_refused_without_digests(data, counts):
    without_digests(data)
    load_manifest(data)
    np.save(data / UNIGRAM_FILE, counts)
    with pytest.raises(UserError, match="unigram.npy: is damaged"):
        load_manifest(data)


@pytest.mark.parametrize("name", ["seq_len", "packing", "source"])
def test_fields_that_disagree_are_refused_without_digests(data, name):
    without_digests(data)
    path = data / MANIFEST_FILE
    entries = json.loads(path.read_text())
    entries[name] = entries[name] * 2
    path.write_text(json.dumps(entries))
    with pytest.raises(UserError, match=f"corrupt: {name} differs"):
        load_manifest(data)


def test_a_flipped_bit_in_a_shard_is_one_line_where_it_is_read(data):
    manifest = load_manifest(data)
    for split in ("train", "test"):
        path = data / f"{split}-00000.array_record"
        used = [i for i, byte in enumerate(path.read_bytes()) if byte]
        flip(path, used[len(used) // 2])
    (problem, _) = integrity.record_problems(manifest, ["train", "test"])
    assert "train split cannot be read" in problem

    def train():
        reader = TrainReader(manifest, batch_size=16, seed=0)
        try:
            for _ in range(20):
                next(reader)
        finally:
            reader.close()

    def evaluate():
        list(eval_batches(manifest, "test", batch_size=8))

    for read, split in ((train, "train"), (evaluate, "test")):
        with pytest.raises(UserError, match=f"the {split} split is damaged") as error:
            read()
        assert str(data) in one_line(error)
    with pytest.raises(UserError, match="the test split is damaged"):
        unigram_perplexity(manifest, "test")


def test_records_of_other_data_are_noticed_by_a_full_check(data, tmp_path):
    manifest = load_manifest(data)
    assert list(integrity.record_problems(manifest, list(manifest.splits))) == []
    shutil.copy(data / "validation-00000.array_record", data / "test-00000.array_record")
    (problem,) = integrity.record_problems(manifest, list(manifest.splits))
    assert "records of the test split differ" in problem
