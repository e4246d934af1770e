"""Hostile values of config fields and hostile data files, each tried in bounded time and memory.

`run()` starts a child process with a memory limit and tries all inputs, each with a time limit. It
returns one row per kind with the numbers of inputs that ended with one line (clean), were rightly
accepted (accepted), were wrongly accepted (silent), ended in a traceback, or hung.

    python -m benchmarks.reliability.configs     prints the table; takes a minute on 2 cores
"""

import codecs
import contextlib
import gzip
import io
import json
import os
import pathlib
import random
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator

OUTCOMES = ("clean", "accepted", "silent", "traceback", "hang")
MEMORY = 8 * 10**9  # bytes of address space of the child
SECONDS = 30  # until one input counts as hung
ALL_SECONDS = 900

# (name, function, whether the input must be refused; None = either)
Case = tuple[str, Callable[[], object], bool | None]


def _config(**fields):
    from esolm_jax.config import default_config

    config = default_config()
    config.data.source, config.data.tokenizer = "text", "bytes"
    with config.ignore_type():
        for name, value in fields.items():
            section, _, field = name.rpartition("__")
            (config[section] if section else config)[field] = value
    return config


def numbers() -> Iterator[Case]:
    """Every numeric field with non-finite values, values beyond 32 bits, and other types."""
    from esolm_jax import config as config_lib

    refused = [float("nan"), float("inf"), -float("inf"), 1e39, -1e39, 1e-60, -(2**31) - 1, -2, "3"]
    large = [2**63, 10**30, True]  # as a float, some fields may be as large
    for name, default in config_lib.flat(config_lib.default_config()).items():
        if type(default) not in (int, float):
            continue
        is_int = isinstance(default, int)
        for value in [*refused, None, *large, *([2**31] * (is_int and not name.endswith("seed")))]:
            field = name.replace(".", "__")
            must = None if value in large and not is_int else True
            yield f"{name}={value!r}", lambda f=field, v=value: _validate({f: v}), must


def _validate(fields: dict) -> None:
    from esolm_jax import config as config_lib

    config_lib.validate(_config(**fields))


def sizes() -> Iterator[Case]:
    """The largest allowed values, which exceed any machine's memory, and usual values."""
    from esolm_jax import config as config_lib

    large = [
        ("train", dict(train__batch_size=2**24)),
        ("train", dict(data__seq_len=2**24)),
        ("train", dict(model__width=2**20, model__heads=8)),
        ("train", dict(model__blocks=1024, model__width=2**16)),
        ("train", dict(model__mlp_width=2**20, model__width=2**15)),
        ("train", dict(model__cond_width=2**20, model__width=2**15)),
        ("train", dict(model__max_positions=2**24, model__width=2**13)),
        ("train", dict(eval__batch_size=2**24)),
        ("train", dict(data__workers=256, data__seq_len=2**16)),
        ("evaluate", dict(eval__batch_size=2**24)),
        ("evaluate", dict(eval__num_orders=10**6, eval__batch_size=2**16)),
        ("evaluate", dict(model__width=2**20, model__heads=8)),
        ("sample", dict(sample__num_texts=2**24)),
        ("sample", dict(sample__length=2**24, sample__num_texts=2**6)),
        ("sample", dict(sample__num_texts=2**20, sample__length=2**20)),
    ]
    for verb, fields in large:
        yield f"{verb} {fields}", lambda v=verb, f=fields: _estimate(v, f), True
    for name in ("train__batch_size", "eval__batch_size", "sample__num_texts"):
        for value in (1, 16, 64):
            yield f"{name}={value}", lambda n=name, v=value: _estimate("train", {n: v}), False
    beyond = {"sample.num_texts": 10**8, "sample.length": 10**9, "eval.batch_size": 10**9}
    beyond |= {"data.workers": 3000, "model.blocks": 10**5, "optimizer.warmup_steps": 2**31}
    beyond |= {"train.batch_size": 10**9, "data.seq_len": 10**9, "model.width": 10**9}
    assert beyond.keys() <= config_lib.flat(config_lib.default_config()).keys()
    for name, value in beyond.items():
        field = name.replace(".", "__")
        yield f"{name}={value}", lambda f=field, v=value: _validate({f: v}), True


def _estimate(verb: str, fields: dict) -> None:
    from esolm_jax import config as config_lib
    from esolm_jax import memory_limit
    from esolm_jax.data.manifest import planned_tokenizer
    from esolm_jax.model import build
    from esolm_jax.parallel import sharding

    config = _config(**fields)
    config_lib.validate(config)
    mesh = sharding.make_mesh(config.mesh)
    model = build.model_config(config, planned_tokenizer(config), "cpu")
    if verb == "sample":
        rows, length = config.sample.num_texts, config.sample.length or config.data.seq_len
        memory_limit.check_sampling(config, model, mesh, rows, length, prompted=False)
    else:
        check = {"train": memory_limit.check_training, "evaluate": memory_limit.check_evaluation}
        check[verb](config, model, mesh)


GOOD = "to be or not to be, that is the question\n" * 20
_UTF8 = GOOD.encode()
_LINES = b"".join(json.dumps({"text": f"{i} {GOOD}"}).encode() + b"\n" for i in range(4))
TEXTS = {  # content of a .txt, and whether it must be refused (None: either is right)
    "empty": (b"", True),
    "white space": (b" \n\t\r\n" * 999, True),
    "byte order mark": (codecs.BOM_UTF8 + _UTF8, False),
    "byte order mark alone": (codecs.BOM_UTF8, True),
    "UTF-16": (GOOD.encode("utf-16"), True),
    "UTF-16, big end first": (codecs.BOM_UTF16_BE + GOOD.encode("utf-16-be"), True),
    "UTF-32": (GOOD.encode("utf-32"), True),
    "UTF-16 without a mark": (("é" + GOOD).encode("utf-16-le"), True),
    "Latin-1": ("café\n".encode("latin-1") * 99, True),
    "half a character": (_UTF8 + "é".encode()[:1], True),
    "a surrogate": (_UTF8 + b"\xed\xa0\x80", True),
    "NULs": (b"\0" * 99_999, None),
    "control characters": (bytes(range(32)) * 99, None),
    "random bytes": (random.Random(0).randbytes(99_999), True),
    "one character": (b"a", True),
    "one sentence": (b"to be, or not to be", False),
    "no end of line": (b"word " * 99_999, False),
    "no space": (b"x" * 999_999, None),
    "emoji": (("😀" * 9_999).encode(), None),
    "carriage returns": (_UTF8.replace(b"\n", b"\r"), False),
    "a binary": (b"\x7fELF" + random.Random(1).randbytes(9_999), True),
}
JSONS = {  # lines of a .jsonl
    "good": (_LINES, False),
    "empty": (b"", True),
    "byte order mark": (codecs.BOM_UTF8 + _LINES, False),
    "UTF-16": (_LINES.decode().encode("utf-16"), True),
    "blank lines": (_LINES.replace(b"\n", b"\n\n  \n"), False),
    "torn line": (_LINES[:-9], True),
    "no object": (_LINES + b"[1]\n", True),
    "a number": (_LINES + b"1\n", True),
    "null": (_LINES + b"null\n", True),
    "no field": (_LINES + b'{"body": "a"}\n', True),
    "many fields": (json.dumps({str(i): i for i in range(9999)}).encode(), True),
    "a number for text": (_LINES + b'{"text": 3}\n', True),
    "null for text": (_LINES + b'{"text": null}\n', True),
    "a list for text": (_LINES + b'{"text": ["a"]}\n', True),
    "half a surrogate pair": (_LINES + b'{"text": "\\ud800"}\n', True),
    "deep": (_LINES + b"[" * 100_000 + b"\n", True),
    "deep objects": (_LINES + b'{"a":' * 100_000 + b"\n", True),
    "NaN beside": (_LINES + b'{"text": "a", "n": NaN}\n', None),
    "a huge number": (_LINES + b'{"text": "a", "n": ' + b"9" * 10_000 + b"}\n", None),
    "NUL in text": (_LINES + b'{"text": "\\u0000"}\n', None),
    "NULs between": (_LINES + b"\0\0\n", True),
    "two objects": (_LINES + b'{"text": "a"}{"text": "b"}\n', True),
    "single quotes": (_LINES + b"{'text': 'a'}\n", True),
    "Latin-1": (_LINES + '{"text": "é"}\n'.encode("latin-1"), True),
    "only empty texts": (b'{"text": ""}\n' * 99, True),
    "equal documents": (b'{"text": "a"}\n' * 999, True),
    "a long line": (json.dumps({"text": "word " * 999_999}).encode() + b"\n", False),
    "a line beyond the limit": (b'{"text": "' + b"x" * (65 * 2**20) + b'"}\n', True),
}


def files(folder: pathlib.Path) -> Iterator[Case]:
    """Contents as .txt and .jsonl, plain, zipped and with upper-case suffixes; damaged archives."""
    for suffix, contents in ((".txt", TEXTS), (".jsonl", JSONS)):
        for name, (content, refused) in contents.items():
            for ending, make in ((suffix, bytes), (suffix + ".gz", gzip.compress)):
                if ending.endswith(".gz") and len(content) > 10**7:
                    continue
                path = _new(folder, "a" + (ending.upper() if len(name) % 2 else ending))
                path.write_bytes(make(content))
                yield f"{ending}: {name}", lambda p=path: _prepare(p, folder), refused
    zipped = gzip.compress(_UTF8 * 99)
    for at in range(0, len(zipped), max(1, len(zipped) // 24)):
        for damaged in (zipped[:at], zipped[:at] + bytes([zipped[at] ^ 1]) + zipped[at + 1 :]):
            path = _new(folder, "a.txt.gz")
            path.write_bytes(damaged)
            # A flip in the header's time or system field has no effect.
            yield f"damaged archive at {at}", lambda p=path: _prepare(p, folder), None
    for name in ("a.txt.gz", "a.jsonl.gz"):
        path = _new(folder, name)
        with gzip.open(path, "wb", compresslevel=1) as file:
            for _ in range(64):
                file.write(b" " * 2**20)
        yield f"gzip bomb {name}", lambda p=path: _prepare(p, folder), True


def places(folder: pathlib.Path) -> Iterator[Case]:
    """Special files, links and folders, by name and within a folder."""
    makers: dict[str, Callable[[pathlib.Path], object]] = {
        "FIFO": os.mkfifo,
        "link to /dev/zero": lambda path: path.symlink_to("/dev/zero"),
        "link to /dev/random": lambda path: path.symlink_to("/dev/random"),
        "link to a terminal": lambda path: path.symlink_to("/dev/tty"),
        "broken link": lambda path: path.symlink_to("/no/such/file"),
        "link to itself": lambda path: path.symlink_to(path),
        "folder": pathlib.Path.mkdir,
    }
    for name, make in makers.items():
        for suffix in (".txt", ".jsonl", ".txt.gz"):
            path = _new(folder, "a" + suffix)
            make(path)
            yield f"{name} a{suffix}", lambda p=path: _prepare(p, folder), True
            (path.parent / "b.txt").write_bytes(_UTF8)
            yield f"{name} in a folder", lambda p=path.parent: _prepare(p, folder), False
    root = _new(folder, "a.txt").parent
    (root / "a.txt").write_bytes(_UTF8)
    for name in ("one", "two", "three"):
        (root / name).symlink_to(root)
    yield "links in circles", lambda: _prepare(root, folder), False
    for spec in ("", ",", " , ,", "/no/such", "/no/such/*.txt", str(root / "*.md"), "/dev/zero",
                 "/dev/stdin", "\0", "~nobody-there/x.txt", "x" * 300 + ".txt"):  # fmt: skip
        yield f"data.train={spec[:20]!r}", lambda s=spec: _prepare(s, folder), True


def small(folder: pathlib.Path) -> Iterator[Case]:
    """Small random corpora, none of which may be refused."""
    rng = random.Random(0)
    words = "to be or not that is the question whether tis nobler in mind suffer".split()
    for i in range(100):
        text = " ".join(rng.choices(words, k=rng.choice([20, 1000, 4000, 10_000])))
        path = _new(folder, "a.txt" if i % 2 else "a.jsonl")
        path.write_text(text if i % 2 else json.dumps({"text": text}))
        yield f"{len(text)} characters", lambda p=path: _splits(p), False


def _new(folder: pathlib.Path, name: str) -> pathlib.Path:
    """A path of this name in a new folder."""
    return pathlib.Path(tempfile.mkdtemp(dir=folder)) / name


def _prepare(path, folder: pathlib.Path) -> None:
    from esolm_jax.data import build

    data = pathlib.Path(tempfile.mkdtemp(dir=folder)) / "data"
    with contextlib.redirect_stdout(io.StringIO()):
        manifest = build.prepare(_config(data__train=str(path)), data, progress=False)
    assert all(manifest.splits[split]["windows"] for split in ("train", "validation", "test"))
    text = manifest.load_tokenizer()
    assert text.kind == "bytes"


def _splits(path: pathlib.Path) -> None:
    from esolm_jax.data import sources

    config = _config(data__train=str(path))
    assert all(any(sources.documents(config, split)) for split in sources.SPLITS)


class _Hang(BaseException):
    pass


def _alarm(*_) -> None:
    raise _Hang


def _outcome(call: Callable[[], object], refused: bool | None) -> tuple[str, str]:
    from esolm_jax.errors import UserError

    signal.alarm(SECONDS)
    try:
        call()
    except UserError as error:
        message = str(error)
        if "\n" in message or len(message) > 6000:
            return "traceback", f"not one line: {message[:200]!r}"
        return ("traceback" if refused is False else "clean"), message
    except _Hang:
        return "hang", ""
    except BaseException as error:
        return "traceback", f"{type(error).__name__}: {error}"[:300]
    finally:
        signal.alarm(0)
    return ("silent" if refused else "accepted"), ""


def _child() -> None:
    """Tries all cases; prints the rows, and faults on stderr."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    signal.signal(signal.SIGALRM, _alarm)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        kinds = {
            "numbers in a config": numbers(),
            "sizes": sizes(),
            "data files": files(folder),
            "special files, links, folders": places(folder),
            "small corpora": small(folder),
        }
        for kind, cases in kinds.items():
            row = {"kind": kind, "inputs": 0} | dict.fromkeys(OUTCOMES, 0)
            for case, call, refused in cases:
                outcome, message = _outcome(call, refused)
                row["inputs"] += 1
                row[outcome] += 1
                if outcome in ("silent", "traceback", "hang"):
                    print(f"{kind}: {case}: {outcome} {message}", file=sys.stderr)
            rows.append(row)
    print(json.dumps(rows))


def run() -> list[dict]:
    """One row a kind: kind, inputs, and the counts of OUTCOMES."""
    command = [sys.executable, "-m", "benchmarks.reliability.configs", "--child"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, timeout=ALL_SECONDS, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    if "--child" in sys.argv:
        _child()
    else:
        for row in run():
            print(row)
