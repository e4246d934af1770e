"""Result files are complete, also if several processes write the same file."""

import threading

import pytest

from esolm_jax import results


def test_two_writers_of_one_file_both_write_it_whole(tmp_path):
    """The second begins and ends while the first is writing; the last to end is what stays."""
    path = tmp_path / "evaluate.json"
    with results.draft_of(path) as first:
        first.write_text("first, ")
        results.write_text(path, "second\n")
        assert path.read_text() == "second\n"
        with open(first, "a") as file:
            file.write("whole\n")
    assert path.read_text() == "first, whole\n"
    assert list(tmp_path.iterdir()) == [path]


def test_many_writers(tmp_path):
    path = tmp_path / "evaluate.json"
    texts = [str(i) * 10000 for i in range(8)]
    threads = [threading.Thread(target=results.write_text, args=(path, t)) for t in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_text() in texts
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_leaves_what_was_there(tmp_path):
    path = tmp_path / "evaluate.json"
    results.write_text(path, "before\n")
    with pytest.raises(OSError, match="full"):
        with results.draft_of(path) as draft:
            draft.write_text("half")
            raise OSError("full")
    assert path.read_text() == "before\n"
    assert list(tmp_path.iterdir()) == [path]
