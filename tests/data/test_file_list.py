"""Which files a data directory means: links, cases, special files, byte order marks, bombs."""

import gzip
import json
import os

import pytest
from text_config import config

from esolm_jax.data import build, compressed, file_list, sources, text_documents
from esolm_jax.errors import UserError


def read(split="train", **data):
    given = {"validation": data["train"], "test": data["train"]} | data
    return list(sources.documents(config(**given), split))


def find(path):
    return file_list.find("train", str(path))


def names(path):
    return [str(file.relative_to(path)) for file in find(path).files]


def test_upper_case_suffixes_are_read(tmp_path):
    (tmp_path / "A.TXT").write_text("one")
    (tmp_path / "b.JsonL").write_text('{"text": "two"}\n')
    (tmp_path / "c.Txt.GZ").write_bytes(gzip.compress(b"three"))
    (tmp_path / "d.JSONL.gz").write_bytes(gzip.compress(b'{"text": "four"}\n'))
    assert read(train=str(tmp_path)) == ["one", "two", "three", "four"]
    assert read(train=str(tmp_path / "A.TXT")) == ["one"]
    assert read(train=f"{tmp_path}/*.GZ") == ["three"]


def test_linked_folders_and_files_are_read(tmp_path):
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    for folder in (inside, outside):
        folder.mkdir()
        (folder / "x.txt").write_text(folder.name)
    (inside / "linked").symlink_to(outside)
    (inside / "y.txt").symlink_to(outside / "x.txt")
    assert names(inside) == ["linked/x.txt", "x.txt"]
    assert read(train=str(inside)) == ["outside", "inside"]
    assert find(inside).left_out == {"further names of the same file": {str(inside / "y.txt")}}


def test_links_in_circles_end(tmp_path):
    """Two links to the folder around them have 2^40 paths."""
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    (folder / "x.txt").write_text("x")
    for name in ("up", "again"):
        (folder / name).symlink_to(tmp_path)
    (tmp_path / "a" / "z").symlink_to(folder)
    (tmp_path / "self.txt").symlink_to(tmp_path / "self.txt")
    assert names(tmp_path) == ["a/b/x.txt"]
    assert {reason: len(paths) for reason, paths in find(tmp_path).left_out.items()} == {
        "links to folders that are read already": 3,
        "broken links": 1,
    }


def test_a_glob_without_an_end_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(file_list, "MAX_MATCHES", 20)
    for i in range(21):
        (tmp_path / f"{i}.txt").write_text("x")
    with pytest.raises(UserError, match="matches more than 20 paths"):
        find(tmp_path / "*.txt")


def test_what_is_left_out_is_counted(tmp_path, tmp_path_factory, capsys):
    (tmp_path / "a.txt").write_text("one two three four five six seven eight nine ten\n" * 9)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "b.csv").write_text("x")
    (tmp_path / "c.pdf").write_text("x")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nothing")
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "zero.txt").symlink_to("/dev/zero")
    wanted = config(tmp_path, test=str(tmp_path / "a.txt"))
    build.prepare(wanted, tmp_path_factory.mktemp("prepared") / "data")
    left_out, same = (
        line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")
    )
    for part in ("2 files that end otherwise (such as", "1 broken links", "2 pipes or devices",
                 "1 empty files", "empty.txt", "gone.txt"):  # fmt: skip
        assert part in left_out
    assert left_out.startswith("note: config.data.train: left out ")
    assert "config.data.train and config.data.test have 1 files in common" in same


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (os.mkfifo, "must be a regular file, not a pipe or a device"),
        (lambda path: path.symlink_to("/dev/zero"), "must be a regular file"),
        (lambda path: path.symlink_to("/no/such"), "broken link: "),
        (lambda path: path.symlink_to(path), "broken link: "),
    ],
)
def test_special_files_by_name_are_refused(tmp_path, make, told):
    make(tmp_path / "x.txt")
    with pytest.raises(UserError, match=told):
        find(tmp_path / "x.txt")


def test_a_file_that_became_a_pipe_is_refused(tmp_path, monkeypatch):
    """Replaced between listing and opening; open() would block."""
    path = tmp_path / "x.txt"
    os.mkfifo(path)
    monkeypatch.setattr(file_list, "find", lambda *_: file_list.FileList([path], {}))
    with pytest.raises(UserError, match="x.txt: .*FIFO"):
        read(train=str(path))


def test_a_folder_that_cannot_be_read_is_told(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "closed").mkdir()
    whole = os.listdir

    def listdir(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied")
        return whole(path)

    monkeypatch.setattr(os, "listdir", listdir)
    with pytest.raises(UserError, match="closed: cannot be read: Permission denied"):
        find(tmp_path)


@pytest.mark.parametrize("zipped", [False, True])
def test_utf8_mark_is_no_text(tmp_path, zipped):
    def write(name, text):
        data = b"\xef\xbb\xbf" + text.encode()
        path = tmp_path / (name + ".gz" * zipped)
        path.write_bytes(gzip.compress(data) if zipped else data)
        return str(path)

    assert read(train=write("a.txt", "word\ufeff\n")) == ["word\ufeff\n"]
    assert read(train=write("a.jsonl", '{"text": "word"}\n')) == ["word"]
    with pytest.raises(UserError, match="no non-empty documents"):
        read(train=write("b.txt", ""))
    path = write("c.txt", "good")
    bad = b"\xef\xbb\xbfgood\xff"
    (tmp_path / path).write_bytes(gzip.compress(bad) if zipped else bad)
    with pytest.raises(UserError, match="not UTF-8 at byte 7:"):
        read(train=path)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.txt.gz"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32"])
def test_other_marks_name_the_encoding(tmp_path, name, encoding):
    text = ("\ufeff" if encoding == "utf-16-be" else "") + '{"text": "word"}\n'
    data = text.encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    with pytest.raises(UserError, match=f"{name}: is {encoding.upper()[:6]}: must be UTF-8"):
        read(train=str(tmp_path))


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz"])
def test_gzip_bomb_is_refused_early(tmp_path, name):
    path = tmp_path / name
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(40):
            file.write(b" " * 2**20)
    with pytest.raises(UserError, match=f"{name}: a gzip bomb: .* more than 200 times as many"):
        read(train=str(path))


def test_text_that_shrinks_well_is_no_bomb(tmp_path, monkeypatch):
    monkeypatch.setattr(compressed, "BOMB_BYTES", 10_000)
    text = "".join(f"line {i}\n" for i in range(20_000))
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text.encode()))
    assert "".join(read(train=str(tmp_path))) == text


@pytest.mark.parametrize("end", ["\n", ""])
def test_a_line_beyond_the_limit_is_told(tmp_path, monkeypatch, end):
    limit = 1000
    monkeypatch.setattr(text_documents, "MAX_READ", limit)
    fits, path = json.dumps({"text": "x" * (limit - 12 - len(end))}), tmp_path / "a.jsonl"
    path.write_text(f"{fits}{end}")
    assert path.stat().st_size == limit and read(train=str(path))
    path.write_text(f'{{"text": "a"}}\n {fits}{end}')
    with pytest.raises(UserError, match="a.jsonl, line 2: must be at most 1,000 bytes.*; split it"):
        read(train=str(path))


def test_names_of_fields_are_told_in_one_line(tmp_path):
    fields = {f"field\n{i}" + "x" * 99: 1 for i in range(999)}
    (tmp_path / "a.jsonl").write_text(json.dumps(fields))
    with pytest.raises(UserError, match=r"has: field\\n0x+, field") as error:
        read(train=str(tmp_path))
    assert len(str(error.value)) < 1500 and "\n" not in str(error.value)


def test_a_file_that_changes_meanwhile_is_noticed(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("one two three\n" * 99)
    write_split = build._write_split

    def change_then_write(config, split, *args):
        if split == "test":
            path.write_text("other\n")
        return write_split(config, split, *args)

    monkeypatch.setattr(build, "_write_split", change_then_write)
    given = config(path, validation=str(path), test=str(path))
    with pytest.raises(UserError, match="a.txt: changed during the read; prepare again"):
        build.prepare(given, tmp_path / "data", progress=False)
    assert not (tmp_path / "data").exists()
