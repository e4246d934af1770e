"""Packing against a brute-force join, and the record format."""

import random

import numpy as np
import pytest

from esolm_jax.data.windows import from_record, pad, record_dtype, to_record, wrap

EOS = 257


def random_documents(seed):
    rng = random.Random(seed)
    return [[rng.randrange(256) for _ in range(rng.randrange(40))] for _ in range(50)]


@pytest.mark.parametrize("length", [1, 2, 7, 16, 10_000])
@pytest.mark.parametrize("seed", range(3))
def test_wrap_is_the_join_of_all_tokens(length, seed):
    documents = random_documents(seed)
    joined = [token for document in documents for token in document + [EOS]]
    windows = list(wrap(iter(documents), length, EOS))
    assert sum(windows, []) == joined
    assert all(len(w) == length for w in windows[:-1]) and 0 < len(windows[-1]) <= length


def test_wrap_of_nothing_is_nothing():
    assert list(wrap(iter([]), 4, EOS)) == []


def test_wrap_streams():
    def endless():
        while True:
            yield [1, 2, 3]

    windows = wrap(endless(), 5, EOS)
    assert [next(windows) for _ in range(2)] == [[1, 2, 3, EOS, 1], [2, 3, EOS, 1, 2]]


def test_pad_is_one_document_a_window():
    documents = [[1], [1, 2, 3], [1, 2, 3, 4], [1, 2, 3, 4, 5]]
    wanted = [[1, EOS], [1, 2, 3, EOS], [1, 2, 3, 4], [1, 2, 3, 4]]
    assert list(pad(iter(documents), 4, EOS)) == wanted


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_records(dtype):
    record = to_record([5, 65535, 0], dtype)
    assert len(record) == 3 * int(dtype[-1])
    x, valid = from_record(record, dtype, 5, pad_id=9)
    assert x.dtype == np.int32 and valid.dtype == bool
    assert x.tolist() == [5, 65535, 0, 9, 9] and valid.tolist() == [True] * 3 + [False] * 2


def test_record_dtype_holds_every_id():
    assert record_dtype(65536) == "<u2" and record_dtype(65537) == "<u4"
