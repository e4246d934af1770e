"""Files of other programs: right, or refused in one line, within bounds; nothing in them is run."""

import contextlib
import json
import pathlib
import resource
import shutil
import signal
import struct
import zipfile

import ml_dtypes
import numpy as np
import published_toy
import pytest
from tiny_run import command

from benchmarks.reliability import foreign_cases as cases
from benchmarks.reliability import foreign_files as files
from esolm_jax.errors import UserError
from esolm_jax.interop import safetensors_file
from esolm_jax.interop.hub import config as hub_config
from esolm_jax.interop.hub import folder as hub_folder
from esolm_jax.interop.published import config as published_config
from esolm_jax.interop.published import file as published_file
from esolm_jax.interop.torch_file import archive as torch_archive

pytestmark = pytest.mark.fast_compile

HUB = pathlib.Path(__file__).parents[1] / "fixtures" / "hf"
ONE = "--config.mesh.devices=1"


@contextlib.contextmanager
def bounded(seconds=30):
    """At most so much time."""

    def stop(*_):
        raise AssertionError(f"not done within {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def little_memory(size=2**30):
    """Limits additional memory; JAX must not run in this context."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextlib.contextmanager
def refused(*parts):
    """One line of error with these parts; memory that ran out is none."""
    with pytest.raises(UserError) as error, bounded():
        yield
    message = str(error.value)
    assert message.isprintable() and len(message) < 4000 and "MemoryError" not in message
    for part in parts:
        assert part in message


@pytest.fixture
def refused_convert(capsys, tmp_path):
    """refused_convert(source, *parts): the verb ends with one line that has these parts."""

    def check(source, *parts, args=()):
        work = f"--workdir={tmp_path / 'run'}"
        with bounded():
            assert command("convert", f"--from={source}", work, *args, ONE) == 2
        (line,) = capsys.readouterr().err.splitlines()
        for part in parts:
            assert part in line
        assert not (tmp_path / "run").exists()

    return check


def run_with(**changes):
    """What a Lightning checkpoint holds, with other parts."""
    state = {f"backbone.{name}": a for name, a in published_toy.weights(0).items()}
    shadow = list(published_toy.weights(1).values())
    content = {"state_dict": state, "hyper_parameters": {"config": published_toy.HYPER}}
    content |= {"ema": {"shadow_params": shadow}, "global_step": 250}
    return content | changes


def named(name):
    return files.Name(name)


# Types of numbers.

NAME = "backbone.blocks.1.mlp.0.weight"


def state_with(array):
    return run_with()["state_dict"] | {NAME: array}


@pytest.mark.parametrize("dtype", ["int64", "int32", "int16", "int8", "uint8", "bool"])
def test_integers_are_no_weights_in_torch(tmp_path, dtype):
    state = {name: (9 * array).astype(dtype) for name, array in run_with()["state_dict"].items()}
    path = files.write_torch(tmp_path / "a.pt", state)
    with refused("a.pt: tensor 'vocab_embed.embedding'", f"is of type {dtype}", "must be float16"):
        published_file.read(path)
    average = [np.zeros(array.shape, dtype) for array in state.values()]
    path = files.write_torch(tmp_path / "b.ckpt", run_with(ema={"shadow_params": average}))
    with refused("b.ckpt, EMA: tensor 'vocab_embed.embedding'", f"is of type {dtype}"):
        published_file.read(path).ema()


def test_types_that_numpy_has_not_are_refused_by_name(tmp_path, refused_convert):
    array = files.Call((named("torch._utils _rebuild_tensor_v3"), (None,) * 6 + (
        named("torch float8_e4m3fn"),)))  # fmt: skip
    path = files.write_torch(tmp_path / "a.ckpt", run_with(state_dict=state_with(array)))
    refused_convert(path, f"'{NAME}' is torch.float8_e4m3fn: must be a tensor")


@pytest.mark.parametrize("dtype", ["I64", "I32", "I8", "U8", "BOOL", "U32", "F8_E4M3", "C64"])
def test_integers_are_no_weights_in_safetensors(tmp_path, refused_convert, dtype):
    folder = pathlib.Path(shutil.copytree(HUB / "gpt2", tmp_path / "hub"))
    change_type(folder / "model.safetensors", dtype)
    refused_convert(folder, "hub: tensor 'transformer.wte.weight' is of type", dtype, "must be")
    tensors = dict.fromkeys(published_toy.shapes(), None)
    assert tensors
    shutil.copy(folder / "model.safetensors", tmp_path / "a.safetensors")
    with refused("a.safetensors: tensor", "is of type", dtype):
        published_file.read(tmp_path / "a.safetensors")


def change_type(file, dtype):
    """The first tensor is of this type, and zeros."""
    header, numbers = files.header_of(file.read_bytes())
    header.pop("__metadata__", None)
    size = {"I64": 8, "C64": 8, "I32": 4, "U32": 4}.get(dtype, 1)
    end, found, parts = 0, {}, []
    for name, entry in header.items():
        begin, stop = entry["data_offsets"]
        content = numbers[begin:stop]
        if name == "transformer.wte.weight":
            content = bytes(int(np.prod(entry["shape"])) * size)
            entry = entry | {"dtype": dtype}
        found[name] = entry | {"data_offsets": [end, end + len(content)]}
        end += len(content)
        parts.append(content)
    file.write_bytes(files.safetensors_of(found, b"".join(parts)))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("value", [np.nan, -np.inf, 1e300])
def test_weights_that_are_not_finite_are_refused(tmp_path, refused_convert, dtype, value):
    array = run_with()["state_dict"][NAME].astype(getattr(ml_dtypes, dtype, dtype))
    with np.errstate(over="ignore"):
        array[3, 4] = value
    tokenizer = f"--tokenizer={published_toy.write_gpt2(tmp_path / 'gpt2')}"
    path = files.write_torch(tmp_path / "a.ckpt", run_with(state_dict=state_with(array)))
    told = "a.ckpt: tensor blocks.1.mlp.0.weight holds NaN or infinity"
    refused_convert(path, told, args=[tokenizer])


def test_weights_of_a_folder_that_are_not_finite_are_refused(tmp_path, refused_convert):
    folder = pathlib.Path(shutil.copytree(HUB / "gpt2", tmp_path / "hub"))
    file = folder / "model.safetensors"
    header, numbers = files.header_of(file.read_bytes())
    begin, _ = header["transformer.h.1.ln_1.bias"]["data_offsets"]
    numbers = numbers[:begin] + struct.pack("<f", np.nan) + numbers[begin + 4 :]
    file.write_bytes(files.safetensors_of(header, numbers))
    refused_convert(folder, "hub: tensor transformer.h.1.ln_1.bias holds NaN or infinity (1 of")


# Bombs.


@pytest.mark.parametrize("name", files.BOMBS)
def test_bombs(tmp_path, name):
    path = files.write_archive(tmp_path / "a.ckpt", files.BOMBS[name](), [bytes(4)])
    with refused(), little_memory():
        published_config.get_config(str(path))


@pytest.mark.parametrize("field", ["model_type", "block_size", "n_heads", "time_conditioning"])
@pytest.mark.parametrize("value", [[1], {"a": 1}, "x" * 10**6, 10**400])
def test_config_beside_safetensors_that_is_odd(tmp_path, field, value):
    path = tmp_path / "a.safetensors"
    shutil.copy(HUB / "gpt2" / "model.safetensors", path)
    said = {"model_type": "bd3lm", "block_size": 4, "n_heads": 4, "time_conditioning": False}
    (tmp_path / "config.json").write_text(json.dumps(said | {field: value}))
    with refused():
        published_config.get_config(str(path))


def test_many_names_that_do_not_fit_are_listed_at_once(tmp_path):
    names = [f"{i:05d}" * 60 for i in range(5_000)]
    with refused("missing tensors"):
        hub_folder.check(dict.fromkeys(names, np.zeros(1)), _parts(), "file")


def _parts():
    return [hub_folder.HubTensor(f"{i:03d}" * 300, (1,), "a") for i in range(500)]


def test_small_storage_under_many_names_is_refused(tmp_path):
    storage = files.Storage(("storage", named("torch FloatStorage"), "0", "cpu", 250_000))
    one = (named("torch._utils _rebuild_tensor_v2"), (storage, 0, (250_000,), (1,), False, {}))
    state = {f"a{i}": files.Call(one) for i in range(1000)}
    path = files.write_torch(tmp_path / "a.pt", {"first": np.zeros(250_000, np.float32)} | state)
    with refused("its tensors share their storage"):
        published_file.read(path)
    tied = {"a": state["a0"], "b": np.zeros(250_000, np.float32)}  # both name storage 0
    assert len(published_file.read(files.write_torch(tmp_path / "b.pt", tied)).raw) == 2


def test_tensors_with_odd_strides(tmp_path):
    storage = files.Storage(("storage", named("torch FloatStorage"), "0", "cpu", 4))

    def read(shape, stride, offset=0):
        call = (named("torch._utils _rebuild_tensor_v2"), (storage, offset, shape, stride))
        content = [np.arange(4, dtype=np.float32), files.Call(call)]
        return torch_archive.Archive(files.write_torch(tmp_path / "a.pt", content)).content[1]

    assert np.asarray(read((1, 4), (2**61, 1))).tolist() == [[0, 1, 2, 3]]  # an unused stride
    assert np.asarray(read((0,), (2**61,), 2**61)).shape == (0,)
    for shape, stride in (((0, 2**61), (1, 1)), ((2,), (2**61,)), ((4, 4), (1, 0))):
        with refused("damaged"):
            read(shape, stride)


# Unneeded objects.


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("name", cases.harmless())
def test_harmless_objects_stay_unopened(tmp_path, monkeypatch, name, protocol):
    monkeypatch.chdir(tmp_path)
    thing = cases.harmless()[name]
    content = run_with(callbacks={"Progress": {"state": thing}}, loops=[thing], extra=thing)
    path = files.write_torch(tmp_path / "a.ckpt", content, protocol)
    published = published_file.read(str(path))
    for key, array in published_toy.weights(0).items():
        np.testing.assert_array_equal(published.raw[key], array)
    for key, array in published_toy.weights(1).items():
        np.testing.assert_array_equal(published.ema()[key], array)
    assert published_config.get_config(str(path)).alpha_0 == 0.25
    assert [file.name for file in tmp_path.iterdir()] == ["a.ckpt"]  # nothing ran


def test_what_is_needed_is_refused_by_name(tmp_path):
    thing = files.Call((named("my.enums Kind"), ("esolm",)))
    hyper = published_toy.HYPER | {"algo": published_toy.HYPER["algo"] | {"name": thing}}
    path = files.write_torch(tmp_path / "a.ckpt", run_with(hyper_parameters={"config": hyper}))
    with refused("hyper-parameter algo.name is my.enums.Kind: must be a scalar"):
        published_config.get_config(str(path))
    path = files.write_torch(tmp_path / "a.ckpt", run_with(state_dict=state_with(thing)))
    with refused(f"'{NAME}' is my.enums.Kind: must be a tensor (nothing was executed)"):
        published_file.read(str(path))
    path = files.write_torch(tmp_path / "a.ckpt", run_with(state_dict=thing))
    with refused("its state_dict must be a dict, not my.enums.Kind"):
        published_file.read(str(path))


@pytest.mark.parametrize("ema", [{"shadow": []}, {}, [], 1, {"shadow_params": {"a": 1}}, "object"])
def test_ema_that_cannot_be_read_is_not_the_raw_weights(tmp_path, refused_convert, ema):
    ema = files.Call((named("my.ema Average"), ())) if ema == "object" else ema
    path = files.write_torch(tmp_path / "a.ckpt", run_with(ema=ema))
    tokenizer = f"--tokenizer={published_toy.write_gpt2(tmp_path / 'gpt2')}"
    refused_convert(path, "a.ckpt: the EMA has", "--weights=raw", args=[tokenizer])


@pytest.mark.parametrize(
    ("path", "value"),
    [("model.n_heads", "2"), ("model.hidden_size", [8]), ("model.length", 2**40)],
)
def test_hyper_parameters_of_the_model_are_not_replaced_by_defaults(tmp_path, path, value):
    hyper = files.with_value(published_toy.HYPER, tuple(path.split(".")), value)
    with refused(f"file: {path}="):
        published_config.from_hyper({"config": hyper}, "file")


# config.json of the hub.


@pytest.mark.parametrize(
    ("family", "change", "told"),
    [
        ("llama3", {"rope_parameters": ["llama3"]}, "rope_parameters=a list: must be an object"),
        ("llama3", {"rope_parameters": 500}, "rope_parameters=500: must be an object"),
        ("llama3", {"rope_parameters": {"full": {"rope_theta": 5.0}}}, "'full' is a dict"),
        ("llama3", {"rope_parameters": {"rope_theta": "5"}}, "rope_theta='5': must be"),
        ("llama3", {"rope_parameters": {"rope_type": ["x"]}}, "'rope_type' is a list"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 (allowed: 1)"),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "rotary_factor=0.5"),
        ("qwen3", {"layer_types": 7}, "layer_types=7"),
        ("qwen3", {"layer_types": [["full_attention"]]}, "layer_types=a list"),
        ("qwen3", {"layer_types": [{"a": 1}, "full_attention"]}, "layer_types=a dict"),
        ("llama", {"model_type": ["llama"]}, "model_type=a list"),
        ("llama", {"model_type": {"a": "llama"}}, "model_type=a dict"),
        ("llama", {"model_type": None}, "model_type=None"),
        ("llama", {"num_hidden_layers": 1000}, "1,000 blocks, but the files hold tensors of 2"),
        ("llama", {"num_hidden_layers": 10**9}, "blocks=1000000000: must be"),
        ("gpt2", {"n_layer": 10**9}, "blocks=1000000000: must be"),
        ("gpt2", {"n_layer": 10**400}, "n_layer=an integer of"),
        ("llama", {"num_key_value_heads": 0}, "num_key_value_heads=0: must be a positive int"),
        ("llama", {"hidden_size": True}, "hidden_size=True"),
        ("llama", {"rms_norm_eps": float("nan")}, "rms_norm_eps=nan"),
        ("llama", {"max_position_embeddings": "64"}, "max_position_embeddings='64'"),
        ("gpt2", {"tie_word_embeddings": "false"}, "tie_word_embeddings='false': must be true or"),
        ("gpt2", {"tie_word_embeddings": None}, "missing tensors: lm_head.weight"),
        ("llama", {"attention_bias": "false"}, "attention_bias='false'"),
        ("llama", {"eos_token_id": 10**400}, "eos_token_id=an integer of"),
        ("llama", {"vocab_size": 10**400}, "vocab_size=an integer of"),
        ("llama", {"vocab_size": [64]}, "vocab_size=a list"),
    ],
)
def test_config_json_of_wrong_types_and_sizes(tmp_path, refused_convert, family, change, told):
    folder = pathlib.Path(shutil.copytree(HUB / family, tmp_path / "hub"))
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    refused_convert(folder, told)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_null_means_what_it_means_in_transformers(tmp_path, family):
    file = tmp_path / "config.json"
    said = json.loads((HUB / family / "config.json").read_text())
    heads = said["num_attention_heads"]

    def read(**change):
        file.write_text(json.dumps(said | change))
        return hub_config.get_config(str(tmp_path))

    assert read(num_key_value_heads=None).to_dict() == read(num_key_value_heads=heads).to_dict()
    nulls = dict.fromkeys(["attention_bias", "mlp_bias", "use_sliding_window", "layer_types"])
    assert read(**nulls).to_dict() == read().to_dict()


def test_json_that_says_two_things_or_nests_is_refused(tmp_path, refused_convert):
    folder = pathlib.Path(shutil.copytree(HUB / "llama", tmp_path / "hub"))
    text = (folder / "config.json").read_text().rstrip()
    (folder / "config.json").write_text(text[:-1] + ', "hidden_size": 16}')
    refused_convert(folder, "the key 'hidden_size' is repeated")
    (folder / "config.json").write_text(text[:-1] + ', "x": ' + "[" * 10**5 + "]" * 10**5 + "}")
    refused_convert(folder, "nested too deeply")


# Inconsistent safetensors, shards and zips.


def lie(change):
    """The header of two tensors of 8 bytes, changed."""
    header = {
        "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]},
    }
    change(header)
    return files.safetensors_of(header, bytes(16))


def entry(name, **fields):
    return lambda header: header[name].update(fields)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (lie(entry("b", data_offsets=[0, 8])), "an overlap at"),
        (lie(entry("b", data_offsets=[4, 12])), "an overlap at"),
        (lie(entry("b", data_offsets=[9, 17])), "a gap before"),
        (lie(entry("b", data_offsets=[8, 24])), "16 bytes for shape (2,) of F32"),
        (lie(entry("b", data_offsets=[16, 8])), "-8 bytes"),
        (lie(entry("b", data_offsets=[-8, 0])), "data_offsets must be two counts"),
        (lie(entry("b", data_offsets=[8])), "data_offsets must be two counts"),
        (lie(entry("b", data_offsets="8")), "data_offsets must be two counts"),
        (lie(entry("b", shape=[2.0])), "shape must be a list of counts"),
        (lie(entry("b", shape=[True, 2])), "shape must be a list of counts"),
        (lie(entry("b", shape=[2**61, 2**61, 0])), "8 bytes for shape"),
        (lie(entry("b", shape=[-1, -2])), "shape must be a list of counts"),
        (lie(entry("b", dtype="F33")), "unknown type 'F33'"),
        (lie(entry("b", dtype=["F32"])), "type a list"),
        (lie(entry("b", dtype="F16")), "8 bytes for shape (2,) of F16"),
        (lie(lambda header: header.pop("b")), "end at byte"),
        (lie(lambda header: header.update(b=[])), "described by a list"),
        (lie(lambda header: header.update(__metadata__=[])), "must hold strings"),
        (lie(lambda header: header.update(__metadata__={"a": 1})), "must hold strings"),
        (lie(lambda h: None).replace(b'"b"', b'"a"'), "'a' is repeated"),
        (struct.pack("<Q", 2**63) + b"{}", "a header of"),
        (struct.pack("<Q", 10) + b"{}", "a header of 10 bytes"),
        (struct.pack("<Q", 2) + b"[]", "its header must be an object"),
        (struct.pack("<Q", 10**5) + b"[" * 10**5, "nested too deeply"),
        (b"", "a header of 0 bytes in a file of 0"),
    ],
)
def test_safetensors_that_lie(tmp_path, content, told):
    (tmp_path / "a.safetensors").write_bytes(content)
    with refused("a.safetensors: truncated, or not a safetensors file", told):
        safetensors_file.read(tmp_path / "a.safetensors")


def test_order_of_the_header_does_not_matter(tmp_path):
    content = lie(lambda header: header.update(a=header.pop("a")))
    (tmp_path / "a.safetensors").write_bytes(content)
    assert list(safetensors_file.read(tmp_path / "a.safetensors")[0]) == ["b", "a"]


def change_index(change):
    def spoil(folder):
        index = folder / "model.safetensors.index.json"
        content = json.loads(index.read_text())
        change(content["weight_map"])
        index.write_text(json.dumps(content))

    return spoil


FIRST, LAST = "model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda f: shutil.copy(HUB / "gpt2/model.safetensors", f), "holds both"),
        (change_index(lambda m: m.update(dict.fromkeys(m, FIRST))), "are missing from all shards"),
        (
            change_index(lambda m: m.update({"model.norm.weight": FIRST})),
            "and also in another file",
        ),
        (lambda f: shutil.copy(f / FIRST, f / LAST), "damaged"),
        (change_index(lambda m: m.update(a="/etc/passwd")), "refused: it names the file"),
        (change_index(lambda m: m.update(a="..")), ""),
        (change_index(lambda m: m.update(a="")), "refused: it names the file"),
        (change_index(lambda m: m.update(a=["x"])), "no weight_map"),
        (lambda f: (f / "model.safetensors.index.json").write_text("[]"), "no weight_map"),
    ],
)
def test_shards_that_are_not_as_the_index_says(tmp_path, refused_convert, spoil, told):
    folder = pathlib.Path(shutil.copytree(HUB / "llama", tmp_path / "hub"))
    spoil(folder)
    refused_convert(folder, told)


def test_links_to_shards_are_followed(tmp_path):
    """As in the cache of the hub."""
    (tmp_path / "hub").mkdir()
    for file in (HUB / "llama").iterdir():
        (tmp_path / "hub" / file.name).symlink_to(file)
    assert hub_folder.tensors(tmp_path / "hub")


def test_records_that_lie(tmp_path):
    path = files.write_torch(tmp_path / "a.pt", {"a": np.zeros(100, np.float32)})
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as zipped:
        data, order = (zipped.getinfo(f"archive/{name}") for name in ("data/0", "byteorder"))
    directory = whole.index(b"PK\x01\x02")
    entry_of = whole.index(b"archive/data/0", directory) - 46

    def spoilt(*changes):
        content = bytearray(whole)
        for position, new in changes:
            content[position : position + len(new)] = new
        path.write_bytes(content)
        return torch_archive.Archive(path)

    with refused("overlaps another"):  # its numbers are those of the record before
        at = data.header_offset
        grown = struct.pack("<I", order.file_size + 80)
        spoilt((whole.index(b"archive/byteorder", directory) - 46 + 20, grown * 2))
        assert at
    with refused("the name of record"):
        spoilt((data.header_offset + 30, b"x"))
    with refused("truncated"):
        spoilt((entry_of + 20, struct.pack("<II", 10**6, 10**6)))
    with refused("compressed"):
        spoilt((entry_of + 20, struct.pack("<I", 10)))
    with refused("damaged: record"):
        np.asarray(spoilt((data.header_offset + 60, b"\1")).content["a"])
    with pytest.warns(UserWarning), zipfile.ZipFile(path, "a") as zipped:
        path.write_bytes(whole)
        zipped.writestr("archive/data/0", bytes(400))
    with refused("is duplicated"):
        torch_archive.Archive(path)


# Special files, wherever a file is opened.


@pytest.mark.parametrize("kind", ["FIFO", "device", "folder", "socket"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_special_files_in_a_folder(tmp_path, refused_convert, kind, name):
    folder = pathlib.Path(shutil.copytree(HUB / "gpt2", tmp_path / "hub"))
    cases.make_special(kind, folder / name)
    refused_convert(folder, f"hub/{name}: is a {kind}")


@pytest.mark.parametrize("kind", ["FIFO", "device", "socket"])
@pytest.mark.parametrize("name", ["a.ckpt", "a.safetensors"])
def test_special_files_instead_of_weights(tmp_path, refused_convert, kind, name):
    cases.make_special(kind, tmp_path / name)
    refused_convert(tmp_path / name, f"{name}: is a {kind}", "must be a regular file")


@pytest.mark.parametrize("kind", ["FIFO", "device"])
@pytest.mark.parametrize("name", ["index", "shard", "beside"])
def test_special_files_that_others_name(tmp_path, refused_convert, kind, name):
    folder = pathlib.Path(shutil.copytree(HUB / "llama", tmp_path / "hub"))
    if name == "beside":
        shutil.copy(HUB / "gpt2" / "model.safetensors", tmp_path / "a.safetensors")
        cases.make_special(kind, tmp_path / "config.json")
        refused_convert(tmp_path / "a.safetensors", f"config.json: is a {kind}")
        return
    file = folder / {"index": "model.safetensors.index.json", "shard": LAST}[name]
    cases.make_special(kind, file)
    refused_convert(folder, f"{file.name}: is a {kind}")


@pytest.mark.parametrize("source", ["~no_such_user/a.ckpt", "x" * 5000, "none/a.ckpt"])
def test_names_that_are_no_files(refused_convert, source):
    refused_convert(source, "--from=", ": ")
