"""Files of torch.save, read without PyTorch; damaged ones are refused, and nothing in them runs."""

import collections
import io
import os
import pathlib
import pickle
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest
from published_toy import FOLDER

from esolm_jax.errors import UserError
from esolm_jax.interop.published import file as published_file
from esolm_jax.interop.torch_file import archive as torch_archive
from esolm_jax.interop.torch_file.objects import Object


def write(path: pathlib.Path, data: bytes, storages=(), root="archive", **more) -> pathlib.Path:
    """A zip as torch.save writes it, around a pickle of one's own."""
    with zipfile.ZipFile(path, "w") as zipped:
        zipped.writestr(f"{root}/data.pkl", data)
        for i, storage in enumerate(storages):
            zipped.writestr(f"{root}/data/{i}", storage)
        for name, content in more.items():
            zipped.writestr(name, content)
    return path


def refused(path, *told):
    with pytest.raises(UserError) as error:
        torch_archive.Archive(path)
    for part in told:
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_dtypes_strides_and_parameters():
    content = torch_archive.Archive(FOLDER / "tensors.pt").content
    grid = np.arange(12).reshape(3, 4)
    for name in ("float64", "float32", "float16", "int64", "int32", "int8", "uint8"):
        array = np.asarray(content[name])
        assert array.dtype == name and array.flags.c_contiguous
        np.testing.assert_array_equal(array, grid)
    assert np.asarray(content["bfloat16"]).dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(np.asarray(content["bfloat16"], np.float32), grid)
    np.testing.assert_array_equal(content["bool"], grid % 2 == 0)
    np.testing.assert_array_equal(content["transposed"], grid.T)
    np.testing.assert_array_equal(content["part"], grid[1:, ::2])
    assert np.asarray(content["scalar"]) == 2.5 and content["scalar"].shape == ()
    np.testing.assert_array_equal(content["parameter"], [1, 1])


# Hostile pickles. Each would leave the file `ran` behind if anything of it were executed.


class Reduced:
    def __init__(self, call, *args):
        self.reduced = call, args

    def __reduce__(self):
        return self.reduced


def hostile(ran) -> dict:
    touch = f"open({str(ran)!r}, 'w')"
    return {
        "os.system": Reduced(os.system, f"touch {ran}"),
        "eval": Reduced(eval, touch),
        "exec": Reduced(exec, touch),
        "open": Reduced(open, str(ran), "w"),
        "getattr": Reduced(getattr, "", "join"),
        "numpy objects": np.array([Reduced(os.system, f"touch {ran}")], dtype=object),
        "numpy array": np.zeros(2),
        "outside of the list": Reduced(collections.ChainMap, {}),
    }


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("which", hostile("x"))
def test_code_does_not_run(tmp_path, which, protocol):
    """In place of a weight it is refused by name; what is not needed stays unopened."""
    ran = tmp_path / "ran"
    state = {"state_dict": {"a": hostile(ran)[which]}, "hyper_parameters": {}}
    path = write(tmp_path / "a.ckpt", pickle.dumps(state, protocol))
    with pytest.raises(UserError, match="'a' is .*: must be a tensor .nothing was executed"):
        published_file.read(str(path))
    other = {"state_dict": {}, "loops": [hostile(ran)[which]]}
    content = torch_archive.Archive(
        write(tmp_path / "b.ckpt", pickle.dumps(other, protocol))
    ).content
    assert content["state_dict"] == {} and isinstance(content["loops"][0], Object)
    assert not ran.exists()
    if which == "os.system":  # the same file in other hands
        pickle.loads(pickle.dumps(state, protocol))
        assert ran.exists()


@pytest.mark.parametrize(
    "program",
    [
        b"cposix\nsystem\n(S'touch ran'\ntR.",
        b"(S'touch ran'\nios\nsystem\n.",  # INST
        b"(cos\nsystem\nS'touch ran'\no.",  # OBJ
        b"\x80\x02\x82\x01.",  # EXT1: a name from the interpreter's registry
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x09touch ran\x85R.",
        b"ctorch._utils\n_rebuild_tensor_v2.__globals__\n.",
        b"ctorch\nfrombuffer\n.",
        b"cbuiltins\neval\n.",
        b"cesolm_jax.interop.torch_file.pickle\nload\n.",
    ],
)
def test_hand_written_programs_do_not_run(tmp_path, program, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "a.ckpt", program)
    with pytest.raises(UserError, match="refused|damaged|must hold a dict of tensors"):
        published_file.read(str(path))
    assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]


@pytest.mark.parametrize(
    "program",
    [
        b"",
        b".",
        b"N",
        b"garbage",
        b"\x80\x02}q\x00(X\x05\x00\x00\x00abc",  # cut
        b"\x80\x02h\x07.",  # a memo that is not there
        b"\x80\x02K\x01K\x02R.",  # calls a number
        b"\x80\x02ccollections\nOrderedDict\n}b.",  # a state for a class
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}b.",
        b"\x80\x02]]s.",
        b"\x80\x02K\x05Q.",
        b"\x80\x02U\x07storageU\x05FloatU\x010K\x01t.",
    ],
)
def test_damaged_pickles_are_refused(tmp_path, program):
    refused(write(tmp_path / "a.ckpt", program), "a.ckpt: damaged")


def test_deep_nesting_does_no_harm(tmp_path):
    program = b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b"."
    assert len(torch_archive.Archive(write(tmp_path / "a.ckpt", program)).content) == 1
    program = b"\x80\x02}N" + b"\x85" * 20_000 + b"Ns."  # a deep key
    assert len(torch_archive.Archive(write(tmp_path / "b.ckpt", program)).content) == 1


def tensor(size=4, offset=0, shape=(4,), stride=(1,), kind="FloatStorage", key="0"):
    """The pickle of one tensor."""

    class Saver(pickle.Pickler):
        def persistent_id(self, obj):
            return obj if isinstance(obj, tuple) and obj[:1] == ("storage",) else None

    out = io.BytesIO()
    Saver(out, 2).dump((("storage", "KIND", key, "cpu", size), offset, shape, stride, False, {}))
    body = out.getvalue()[2:-1]
    # KIND is a class of torch: a GLOBAL in place of the string.
    text = b"X\x04\x00\x00\x00KIND"
    assert body.count(text) == 1
    body = body.replace(text, b"ctorch\n" + kind.encode() + b"\n")
    return b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n" + body + b"R."


def test_a_tensor_by_hand(tmp_path):
    storage = np.arange(4, dtype=np.float32).tobytes()
    path = write(tmp_path / "a.pt", tensor(shape=(2, 2), stride=(1, 2)), [storage])
    np.testing.assert_array_equal(torch_archive.Archive(path).content, [[0, 2], [1, 3]])


@pytest.mark.parametrize(
    "wrong",
    [
        dict(shape=(5,)),
        dict(offset=1),
        dict(shape=(2,), stride=(4,)),
        dict(shape=(10**6, 10**6), stride=(0, 0)),  # would fill the memory
        dict(shape=(-1,)),
        dict(offset=-1),
        dict(stride=(-1,)),
        dict(shape=(2, 2)),
        dict(shape=(1.5,)),
        dict(shape=(1,) * 40, stride=(1,) * 40),
        dict(size="4"),
        dict(key=0),
    ],
)
def test_tensors_outside_of_their_storage(tmp_path, wrong):
    refused(write(tmp_path / "a.pt", tensor(**wrong), [bytes(16)]), "damaged")


def test_storages_that_are_not_as_said(tmp_path):
    content = torch_archive.Archive(write(tmp_path / "a.pt", tensor(kind="QInt8Storage"))).content
    assert str(content.kind) == "torch.QInt8Storage"
    for storages in ([bytes(12)], []):
        content = torch_archive.Archive(write(tmp_path / "b.pt", tensor(), storages)).content
        with pytest.raises(UserError, match="damaged|truncated"):
            np.asarray(content)


def test_truncated_and_other_files(tmp_path):
    whole = (FOLDER / "esolm.ckpt").read_bytes()
    path = tmp_path / "a.ckpt"
    for size in (0, 3, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        refused(path, "a.ckpt: truncated")
    refused(tmp_path / "none.ckpt", "none.ckpt")
    with zipfile.ZipFile(path, "w") as zipped:
        zipped.writestr("a/version", "3")
    refused(path, "no record NAME/data.pkl")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as zipped:
        zipped.writestr("a/data.pkl", "N." * 1000)
    refused(path, "compressed")
    refused(write(path, b"N.", **{"archive/byteorder": "big"}), "byte order")


def test_a_flipped_bit_is_found(tmp_path):
    path = tmp_path / "a.pt"
    storage = np.arange(1000, dtype=np.float32).tobytes()
    write(path, tensor(1000, 0, (1000,)), [storage])
    content = bytearray(path.read_bytes())
    content[content.index(struct.pack("<f", 500.0)) + 1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="damaged: record 'archive/data/0'"):
        np.asarray(torch_archive.Archive(path).content)


@pytest.mark.parametrize("name", ["/etc/cron.d/x", "../../x", "archive/../../x", "a\\..\\x"])
def test_records_with_paths_are_refused_and_nothing_is_written(tmp_path, name):
    folder = tmp_path / "in"
    folder.mkdir()
    refused(write(folder / "a.ckpt", b"N.", **{name: "x"}), "refused: it holds a record named")
    assert [path.name for path in tmp_path.rglob("*")] == ["in", "a.ckpt"]


def test_objects_of_other_libraries_are_inert():
    content = torch_archive.Archive(FOLDER / "esolm.ckpt").content
    tokenizer = content["hyper_parameters"]["tokenizer"]
    assert str(tokenizer.kind) == "transformers.GPT2TokenizerFast"
    assert tokenizer.state == {"name": "gpt2"}
