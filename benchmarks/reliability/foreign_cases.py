"""The inputs of `reliability.foreign`, by kind, and the outcome of `convert` for each."""

import dataclasses
import json
import os
import pathlib
import random
import shutil
import socket
import sys
from collections.abc import Callable
from typing import Any

import jax
import ml_dtypes
import numpy as np

from benchmarks.reliability import foreign_files as files
from esolm_jax import config as config_lib
from esolm_jax.interop.hub import config as hub_config
from esolm_jax.interop.hub import from_hub
from esolm_jax.interop.published import config as published_config
from esolm_jax.interop.published import read as published_read
from esolm_jax.training import restore

TESTS = pathlib.Path(__file__).resolve().parents[2] / "tests"
sys.path.insert(0, str(TESTS / "support"))
import published_toy  # noqa: E402

FAMILIES = ("gpt2", "llama", "llama3", "qwen2", "qwen3")
SPECIAL = ("FIFO", "device", "folder", "socket", "missing", "broken link", "empty")
TYPES = ("int64", "int32", "int16", "int8", "uint8", "bool")
ST_TYPES = {
    "int64": "I64", "int32": "I32", "int8": "I8", "bool": "BOOL", "uint32": "U32", "F8": "F8_E4M3",
    "complex64": "C64",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Case:
    """An input of `convert`; strict: its result must equal that of the undamaged file."""

    what: str
    base: str
    source: pathlib.Path
    tokenizer: str = ""
    strict: bool = True


def number(kind: str, count: int) -> int:
    """The number of inputs of a kind: a whole list, or `count` random ones."""
    return len(KINDS[kind]) if isinstance(KINDS[kind], list) else count


class Inputs:
    """Undamaged files, inputs made from them, and the results of `convert` for both."""

    def __init__(self, folder: pathlib.Path, seed: int):
        self.folder, self.seed = folder, seed
        self.gpt2 = str(published_toy.write_gpt2(folder / "gpt2_tokenizer"))
        self.bert = str(published_toy.write_bert(folder / "bert_tokenizer", 258, 257))
        self.state = {f"backbone.{n}": a for n, a in published_toy.weights(0).items()}
        self.run = {
            "state_dict": self.state,
            "hyper_parameters": {"config": published_toy.HYPER},
            "ema": {"shadow_params": list(published_toy.weights(1).values()), "num_updates": 9},
            "global_step": 9,
        }
        self.torch = files.write_torch(folder / "run.ckpt", self.run)
        self.bases: dict[str, tuple[dict, dict]] = {}
        self.draft = folder / "draft"

    def base(self, name: str) -> pathlib.Path:
        """An undamaged file or folder."""
        if name in FAMILIES:
            return TESTS / "fixtures" / "hf" / name
        return TESTS / "fixtures" / "esolm.ckpt" if name == "lightning" else self.torch

    def warm_up(self, kind: str) -> None:
        names = ("lightning", "torch") if kind in PUBLISHED else ()
        names += FAMILIES if kind in HUB else ()
        for name in names:
            case = Case("undamaged", name, self.base(name), self.tokenizer(name))
            self.bases[name] = self.load(case)

    def tokenizer(self, base: str) -> str:
        return "" if base in FAMILIES else self.gpt2

    def make(self, kind: str, i: int) -> Case:
        shutil.rmtree(self.draft, ignore_errors=True)
        self.draft.mkdir()
        made = KINDS[kind]
        rng = random.Random(f"{self.seed} {kind} {i}")
        return made[i](self) if isinstance(made, list) else made(self, rng)

    def copy(self, family: str) -> pathlib.Path:
        return pathlib.Path(shutil.copytree(self.base(family), self.draft / family))

    def load(self, case: Case) -> tuple[dict, dict]:
        """(arrays by name, fields of the config on which the model depends)."""
        caught: dict[str, np.ndarray] = {}

        def write(workdir, meta, tokenizer, save):
            del workdir, meta, tokenizer
            folder = self.folder / "arrays_of"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            save(_Catch(caught), folder)

        config = _config(str(case.source))
        with config.unlocked():
            config.mesh.devices = 1
        config_lib.validate(config)
        published_read.write_workdir, kept = write, published_read.write_workdir
        try:
            workdir, source = self.folder / "none", str(case.source)
            if hub_config.is_folder(source):
                from_hub.convert(config, source, workdir, case.tokenizer)
            else:
                published_read.convert(config, source, workdir, case.tokenizer, "both")
        finally:
            published_read.write_workdir = kept
        fields = config_lib.flat(config)
        names = (*restore.MODEL_FIELDS, "alpha_0", "block_length")
        return caught, {name: fields[name] for name in names}

    def difference(self, case: Case, result: tuple[dict, dict]) -> str:
        """A difference from the undamaged file, or ""."""
        arrays, fields = result
        wanted, wanted_fields = self.bases[case.base]
        for name, array in arrays.items():
            if array.dtype != np.float32 or not np.isfinite(array).all():
                return f"{name} is {array.dtype}, or not finite"
        if not case.strict:
            return ""
        for name, value in wanted_fields.items():
            if fields[name] != value:
                return f"{name} is {fields[name]}, was {value}"
        for name, array in wanted.items():
            if name not in arrays or not np.array_equal(arrays[name], array):
                return f"{name} is other"
        return ""


class _Catch:
    """Replaces checkpoint.Checkpoints: keeps the weights in memory."""

    def __init__(self, caught: dict):
        self.caught = caught

    def save(self, state, meta) -> None:
        self.save_weights({"params": state.params, "ema": state.ema}, meta)

    def save_weights(self, params, meta) -> None:
        json.dumps(meta)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params):
            self.caught[jax.tree_util.keystr(path)] = np.array(leaf)


def _config(source: str):
    reader = hub_config if hub_config.is_folder(source) else published_config
    return reader.get_config(source)


# Random inputs.


def _bits(inputs: Inputs, rng: random.Random) -> Case:
    base = rng.choice(("lightning", "torch"))
    path = inputs.draft / "a.ckpt"
    path.write_bytes(files.flipped(inputs.base(base).read_bytes(), rng))
    return Case("a bit", base, path, inputs.gpt2)


def _mangled(inputs: Inputs, rng: random.Random) -> Case:
    base = rng.choice(("lightning", "torch"))
    path = inputs.draft / "a.ckpt"
    path.write_bytes(files.mangled(inputs.base(base).read_bytes(), rng))
    return Case("bytes", base, path, inputs.gpt2)


def _program(inputs: Inputs, rng: random.Random, change: Callable) -> Case:
    import zipfile

    base = rng.choice(("lightning", "torch"))
    with zipfile.ZipFile(inputs.base(base)) as zipped:
        names = sorted(zipped.namelist())
        (name,) = (n for n in names if n.endswith("/data.pkl"))
        program = zipped.read(name)
        parts = {n: zipped.read(n) for n in names if n != name}
    path = inputs.draft / "a.ckpt"
    with zipfile.ZipFile(path, "w") as zipped:
        zipped.writestr(name, change(program, rng))
        for part, content in parts.items():
            zipped.writestr(part, content)
    return Case("a pickle", base, path, inputs.gpt2, strict=False)


def _hyper(inputs: Inputs, rng: random.Random) -> Case:
    hyper, what = files.swapped(published_toy.HYPER, rng)
    run = inputs.run | {"hyper_parameters": {"config": hyper}}
    means = "null" in what or what.endswith(files.MAY_MEAN)
    path = files.write_torch(inputs.draft / "a.ckpt", run)
    return Case(what, "torch", path, inputs.gpt2, strict=not means)


def _checkpoint(inputs: Inputs, rng: random.Random) -> Case:
    """Another type in place of any part of a checkpoint but the hyper-parameters."""
    run, what = files.swapped({k: v for k, v in inputs.run.items() if k[0] != "h"}, rng)
    run["hyper_parameters"] = inputs.run["hyper_parameters"]
    path = files.write_torch(inputs.draft / "a.ckpt", run)
    return Case(what, "torch", path, inputs.gpt2, strict="ema = null" not in what)


def _hub_file(inputs: Inputs, rng: random.Random) -> tuple[str, pathlib.Path, pathlib.Path]:
    family = rng.choice(FAMILIES)
    folder = inputs.copy(family)
    return family, folder, rng.choice(sorted(folder.glob("*.safetensors")))


def _safetensors_bits(inputs: Inputs, rng: random.Random) -> Case:
    family, folder, file = _hub_file(inputs, rng)
    content = file.read_bytes()
    in_header = rng.random() < 0.8
    stop = 8 + int.from_bytes(content[:8], "little") if in_header else None
    file.write_bytes(files.flipped(content, rng, 0, stop))
    return Case("a bit", family, folder, strict=in_header)


def _safetensors_mangled(inputs: Inputs, rng: random.Random) -> Case:
    family, folder, file = _hub_file(inputs, rng)
    content = file.read_bytes()
    size = 8 + int.from_bytes(content[:8], "little")
    file.write_bytes(files.mangled(content[:size], rng) + content[size:])
    return Case("bytes of a header", family, folder)


def _safetensors_header(inputs: Inputs, rng: random.Random) -> Case:
    family, folder, file = _hub_file(inputs, rng)
    header, numbers = files.header_of(file.read_bytes())
    header, what = files.swapped(header, rng)
    file.write_bytes(files.safetensors_of(header, numbers))
    return Case(what, family, folder)


def _json(inputs: Inputs, rng: random.Random, name: str, strict: bool) -> Case:
    family = "llama" if "index" in name else rng.choice(FAMILIES)
    folder = inputs.copy(family)
    content, what = files.swapped(json.loads((folder / name).read_text()), rng)
    (folder / name).write_text(json.dumps(content))
    # Null has a meaning; a boolean in place of a boolean is of the right type.
    means = "null" in what or "true" in what or what.endswith(files.MAY_MEAN)
    return Case(f"{family}: {what}", family, folder, strict=strict and not means)


def _json_bytes(inputs: Inputs, rng: random.Random) -> Case:
    family = rng.choice(FAMILIES)
    folder = inputs.copy(family)
    file = rng.choice(sorted(folder.glob("*.json")))
    file.write_bytes(files.mangled(file.read_bytes(), rng))
    return Case(f"bytes of {file.name}", family, folder, strict=False)


def _tokenizer_bytes(inputs: Inputs, rng: random.Random) -> Case:
    kind = rng.choice(("gpt2", "bert"))
    folder = pathlib.Path(shutil.copytree(getattr(inputs, kind), inputs.draft / "tokenizer"))
    file = rng.choice(sorted(folder.iterdir()))
    if file.suffix == ".json" and rng.random() < 0.5:
        content, what = files.swapped(json.loads(file.read_text()), rng)
        file.write_text(json.dumps(content))
    else:
        file.write_bytes(files.mangled(file.read_bytes(), rng))
        what = "bytes"
    return Case(f"{what} of {file.name}", "torch", inputs.torch, str(folder), strict=False)


# Lists of inputs.


def _bomb(name: str) -> Callable[[Inputs], Case]:
    def make(inputs: Inputs) -> Case:
        path = files.write_archive(inputs.draft / "a.ckpt", files.BOMBS[name](), [bytes(4)])
        return Case(name, "torch", path, inputs.gpt2)

    return make


def _torch_type(name: str) -> Callable[[Inputs], Case]:
    def make(inputs: Inputs) -> Case:
        state = {key: (100 * array).astype(name) for key, array in inputs.state.items()}
        path = files.write_torch(inputs.draft / "a.ckpt", inputs.run | {"state_dict": state})
        return Case(f"{name} in .ckpt", "torch", path, inputs.gpt2)

    return make


def _safetensors_type(name: str) -> Callable[[Inputs], Case]:
    def make(inputs: Inputs) -> Case:
        folder = inputs.copy("gpt2")
        file = folder / "model.safetensors"
        header, numbers = files.header_of(file.read_bytes())
        header.pop("__metadata__", None)
        bits, found, end = {"I64": 64, "C64": 64, "I32": 32, "U32": 32}, {}, 0
        for key, entry in header.items():
            size = int(np.prod(entry["shape"])) * bits.get(ST_TYPES[name], 8) // 8
            found[key] = entry | {"dtype": ST_TYPES[name], "data_offsets": [end, end + size]}
            end += size
        file.write_bytes(files.safetensors_of(found, (numbers * 3)[:end]))
        return Case(f"{name} in safetensors", "gpt2", folder)

    return make


def _not_finite(value: float, dtype: str) -> Callable[[Inputs], Case]:
    def make(inputs: Inputs) -> Case:
        name = "backbone.blocks.1.mlp.0.weight"
        state = inputs.state | {name: inputs.state[name].astype(dtype)}
        state[name][3, 4] = value
        path = files.write_torch(inputs.draft / "a.ckpt", inputs.run | {"state_dict": state})
        return Case(f"{value} in {dtype}", "torch", path, inputs.gpt2)

    return make


def make_special(kind: str, path: pathlib.Path) -> None:
    """A special file in place of a file."""
    path.unlink(missing_ok=True)
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    elif kind == "broken link":
        path.symlink_to("nothing")
    elif kind == "empty":
        path.touch()
    elif kind == "socket":
        here = os.getcwd()
        os.chdir(path.parent)  # the name of a socket must be short
        socket.socket(socket.AF_UNIX).bind(path.name)
        os.chdir(here)


def _special(kind: str, name: str) -> Callable[[Inputs], Case]:
    def make(inputs: Inputs) -> Case:
        what = f"{kind} for {name}"
        if name.endswith((".ckpt", ".safetensors")) and "-of-" not in name and "model" not in name:
            make_special(kind, inputs.draft / name)
            return Case(what, "torch", inputs.draft / name, inputs.gpt2)
        if name in ("vocab.json", "merges.txt"):
            folder = pathlib.Path(shutil.copytree(inputs.gpt2, inputs.draft / "tokenizer"))
            make_special(kind, folder / name)
            return Case(what, "torch", inputs.torch, str(folder))
        family = "llama" if "-of-" in name or "index" in name else "gpt2"
        folder = inputs.copy(family)
        make_special(kind, folder / name)
        return Case(what, family, folder)

    return make


def harmless() -> dict[str, Any]:
    """Objects that a checkpoint may hold in addition to its weights, in pickle's terms."""
    array = files.Call(
        (files.Name("numpy.core.multiarray _reconstruct"), (files.Name("numpy ndarray"), (0,), "b"))
    )
    date = (files.Name("datetime datetime"), (b"\x07\xea\x0b\x1a\x09\x22\x25\x00\x00\x00",))
    return {
        "numpy array": [array],
        "random state": ("MT19937", array, 624, 0, 0.0),
        "date": files.Call(date),
        "enum": files.Call((files.Name("lightning.Stage Stage"), ("train",))),
        "a key": {files.Call((files.Name("enum Key"), (1,))): 1, (1, (2, 3)): 2},
        "OrderedDict": files.Call((files.Name("my.module MyOrderedDict"), ())),
        "a function": files.Name("my.module main.<locals>.f"),
        "a partial": files.Call((files.Call((files.Name("functools partial"), ())), (1,))),
        "a system call": files.Call((files.Name("os system"), ("touch ran",))),
        "an 8-bit tensor": files.Call(
            (
                files.Name("torch._utils _rebuild_tensor_v3"),
                (
                    files.Storage(
                        ("storage", files.Name("torch.storage UntypedStorage"), "0", "cpu", 4)
                    ),
                    0, (4,), (1,), False, {}, files.Name("torch float8_e4m3fn"),
                ),
            )
        ),
        "a sparse tensor": files.Call((files.Name("torch._utils _rebuild_sparse_tensor"), (1,))),
        "integers": np.arange(3),
    }  # fmt: skip


def _harmless(name: str) -> Callable[[Inputs], Case]:
    def make(inputs: Inputs) -> Case:
        run = inputs.run | {"callbacks": {"state": harmless()[name]}, "loops": harmless()[name]}
        path = files.write_torch(inputs.draft / "a.ckpt", run)
        return Case(f"{name} beside the weights", "torch", path, inputs.gpt2)

    return make


_FILES = ("a.ckpt", "a.safetensors", "vocab.json", "merges.txt", "config.json", "model.safetensors")
_FILES += ("tokenizer.json", "model.safetensors.index.json", "model-00002-of-00003.safetensors")
_RANDOM = {
    "bits of .ckpt": _bits,
    "bytes of .ckpt": _mangled,
    "bytes of a pickle": lambda inputs, rng: _program(inputs, rng, files.mangled),
    "opcodes of a pickle": lambda inputs, rng: _program(inputs, rng, files.other_opcodes),
    "types in hyper-parameters": _hyper,
    "types in a checkpoint": _checkpoint,
    "bytes of a tokenizer": _tokenizer_bytes,
    "bits of safetensors": _safetensors_bits,
    "bytes of a header": _safetensors_mangled,
    "types in a header": _safetensors_header,
    "types in config.json": lambda inputs, rng: _json(inputs, rng, "config.json", True),
    "types in an index": lambda i, rng: _json(i, rng, "model.safetensors.index.json", True),
    "types in tokenizer.json": lambda inputs, rng: _json(inputs, rng, "tokenizer.json", False),
    "bytes of JSON": _json_bytes,
}
_LISTS = {
    "bombs": [_bomb(name) for name in files.BOMBS],
    "types of numbers": [_torch_type(n) for n in TYPES] + [_safetensors_type(n) for n in ST_TYPES],
    "not finite": [
        _not_finite(value, dtype)
        for dtype in ("float32", "float16", "float64", ml_dtypes.bfloat16)
        for value in (np.nan, np.inf, -np.inf)
    ] + [_not_finite(1e300, "float64")],
    "special files": [_special(kind, name) for kind in SPECIAL for name in _FILES],
    "harmless objects": [_harmless(name) for name in harmless()],
}  # fmt: skip
KINDS: dict[str, Any] = _RANDOM | _LISTS
PUBLISHED = {*list(_RANDOM)[:7], "bombs", "types of numbers", "not finite", "special files"}
PUBLISHED |= {"harmless objects"}
HUB = {*list(_RANDOM)[7:], "types of numbers", "special files"}
