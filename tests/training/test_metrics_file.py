"""metrics.jsonl: only damaged lines are dropped, with a message and a copy of the file."""

import json

import pytest

from esolm_jax.training import metrics, metrics_file
from esolm_jax.training.metrics_file import line_of

ENTRIES = [{"step": step, "loss": 5.0 / step, "timing": {"speed": 1.5}} for step in range(1, 7)]


@pytest.fixture
def path(tmp_path):
    (tmp_path / metrics.FILE).write_text("".join(line_of(entry) + "\n" for entry in ENTRIES))
    return tmp_path / metrics.FILE


def replace_line(path, number: int, text: str) -> None:
    lines = path.read_text().splitlines()
    lines[number - 1] = text
    path.write_text("".join(f"{line}\n" for line in lines))


def test_lines_are_json_and_come_back(path):
    assert [json.loads(line)["loss"] for line in path.read_text().splitlines()] == [
        entry["loss"] for entry in ENTRIES
    ]
    assert metrics.read(path.parent) == ENTRIES


@pytest.mark.parametrize(
    "damage", ["", "x", "null", '{"loss": 1.0}', '{"step": 3, "loss": 1.0}', "[" * 100_000]
)
def test_a_damaged_line_costs_itself_alone(path, damage):
    replace_line(path, 3, damage)
    before = path.read_bytes()
    assert metrics.read(path.parent) == ENTRIES[:2] + ENTRIES[3:]
    left, said = metrics_file.keep_until(path, 5, 5)
    assert left == 4
    assert "line 3 damaged" in said and "1 of 5 entries" in said and "damaged-1" in said
    assert metrics.read(path.parent) == ENTRIES[:2] + ENTRIES[3:5]
    assert path.with_name(f"{metrics.FILE}.damaged-1").read_bytes() == before


def test_every_flipped_bit_is_noticed(path):
    good = path.read_bytes()
    for position in range(len(good)):
        damaged = bytearray(good)
        damaged[position] ^= 1 << position % 8
        content = metrics_file.parse(bytes(damaged))
        assert all(entry in ENTRIES for entry in content.entries)
        assert len(content.entries) >= len(ENTRIES) - 2  # two where a newline was flipped
        assert content.damaged or len(content.entries) < len(ENTRIES) or position == len(good) - 1


@pytest.mark.parametrize("cut", [1, 10, 30])
def test_a_torn_last_line_is_dropped_without_a_word(path, cut):
    path.write_bytes(path.read_bytes()[:-cut])
    torn = cut > 1  # else only the newline is missing
    assert metrics.read(path.parent) == (ENTRIES[:-1] if torn else ENTRIES)
    assert metrics_file.keep_until(path, 5, 5) == (5, None)
    assert metrics.read(path.parent) == ENTRIES[:5]
    assert not list(path.parent.glob("*damaged*"))


def test_lost_entries_are_reported(path):
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:2]))
    assert "4 of 6 entries up to step 6 are missing" in metrics_file.keep_until(path, 6, 6)[1]
    path.unlink()
    assert "6 of 6 entries" in metrics_file.keep_until(path, 6, 6)[1]


def test_a_folder_in_place_of_the_file_is_moved(path):
    path.unlink()
    path.mkdir()
    assert "kept as metrics.jsonl.damaged-1" in metrics_file.keep_until(path, 6, 0)[1]
    assert path.is_file()


def test_lines_without_checksums_of_earlier_versions_are_taken(path):
    old = [{"step": 0, "loss": 9.0}]
    path.write_text(json.dumps(old[0]) + "\n" + path.read_text())
    assert metrics.read(path.parent) == old + ENTRIES


def test_a_file_of_an_earlier_version_keeps_what_is_behind_a_damaged_line(path):
    lines = [json.dumps(entry) for entry in ENTRIES]
    path.write_text("".join(f"{line}\n" for line in [*lines[:2], lines[2][:-9], *lines[3:]]))
    assert metrics.read(path.parent) == ENTRIES[:2] + ENTRIES[3:]
