"""Files of others: special files, sizes and odd JSON are refused in one line, at once."""

import os
import socket

import pytest

from esolm_jax.errors import UserError
from esolm_jax.files import regular_file


def refused(call, *parts):
    with pytest.raises(UserError) as error:
        call()
    for part in parts:
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def special(kind, path):
    """Makes a special file; returns its path."""
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        socket.socket(socket.AF_UNIX).bind(str(path))
    else:
        path.symlink_to("/dev/zero")
    return path


@pytest.mark.parametrize("kind", ["FIFO", "folder", "socket", "device"])
def test_special_files_are_refused(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)  # the name of a socket must be short
    path = special(kind, tmp_path.relative_to(tmp_path) / "a")
    assert regular_file.is_there(path)
    refused(lambda: regular_file.open_regular(path), f"a: is a {kind}", "a regular file")
    refused(lambda: regular_file.read_json(path, 99, "--from=a"), "--from=a: is a")


@pytest.mark.parametrize("name", ["none", "x" * 5000, "a\0b", "file/inside"])
def test_names_that_are_no_file(tmp_path, name):
    (tmp_path / "file").write_text("x")
    path = os.path.join(tmp_path, name)
    assert not regular_file.is_there(path)
    refused(lambda: regular_file.open_regular(path))


def test_a_link_is_followed_and_size_is_bounded(tmp_path):
    (tmp_path / "file").write_bytes(b"12345")
    (tmp_path / "link").symlink_to("file")
    assert regular_file.read_bytes(tmp_path / "link", 5) == b"12345"
    refused(lambda: regular_file.read_bytes(tmp_path / "link", 4), "at most 0")
    assert str(regular_file.expand("~no_such_user/a")) == "~no_such_user/a"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"a": 1, "a": 2}', "'a' is repeated"),
        ('[{"b": {"c": 1, "c": 1}}]', "'c' is repeated"),
        ("[" * 100 + "]" * 100, "nested deeper"),
        ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ("9" * 5000, "not JSON"),
        ("\ufeff{}", "not JSON"),
        ("{", "not JSON"),
    ],
)
def test_odd_json_is_refused(text, told):
    refused(lambda: regular_file.parse_json(text, "file"), "file: ", told)


def test_json():
    assert regular_file.parse_json('{"a": [1, {"b": null}]}', "file") == {"a": [1, {"b": None}]}
