"""Hostile prompts and prompt files: each is read, or refused in one line.

Thousands of random prompts in a few processes with a memory limit and a time limit per prompt.
"""

import json
import os
import pathlib
import random
import resource
import signal

from benchmarks.reliability import verbs
from benchmarks.reliability.verbs import Row

_PIECES = (
    "to be",
    " ",
    "\n",
    "[MASK]",
    "[MASK:3]",
    "[MASK:0]",
    "[MASK:-1]",
    "[MASK:999999]",
    "[MASK:1e9]",
    "[MASK:",
    "[MASK:٣]",
    "]",
    "\x00",
    "\ufeff",
    "\u2028",
    "▁",
    "é",
    "漢字",
    "🙂",
    "<s>",
    "</s>",
    "<unk>",
    "<0x0A>",
    "\ud800",
    "a" * 10_000,
    "[MASK]" * 500,
)
_VALUES = (
    None,
    True,
    0,
    -1,
    2**70,
    1e400,
    "x",
    [],
    {},
    [[0, 1]],
    [[1, 0]],
    [[0, 10**9]],
    [["0", 1]],
)
_SECONDS = 20  # until one prompt counts as hanging
_MEMORY = 6 * 2**30


class _Hang(Exception):
    """The alarm rang."""


def run(folder: pathlib.Path, count: int, seed: int = 0) -> list[dict]:
    """Rows for texts, lines of JSONL and special files; `count` of the first two in all."""
    rows = []
    kinds = (("prompts", _texts, count // 2), ("lines of JSONL", _lines, count // 2))
    for what, make, share in (*kinds, ("prompt files that are not files", _files, 0)):
        found = verbs.Child(lambda make=make, share=share: _try(make, folder, share, seed)).wait(
            900
        )
        row = Row(what)
        if found.code != 0:
            row.add(found.fault or "traceback", found.err[-2000:])
        for outcome, why in found.value or []:
            row.add(outcome, why)
        rows.append(row.to_json())
        print(f"  {what}: {dict(row.counts)}", flush=True)
    return rows


def _try(make, folder: pathlib.Path, count: int, seed: int) -> list[tuple[str, str]]:
    from esolm_jax.data.tokenizer import Bytes
    from esolm_jax.errors import UserError

    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    signal.signal(signal.SIGALRM, _ring)
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for name, attempt in make(random.Random(seed), folder, count, Bytes()):
        signal.alarm(_SECONDS)
        try:
            attempt()
            found.append(("identical", ""))
        except UserError as error:
            one_line = "\n" not in str(error) and len(str(error)) < 2000
            found.append(("clean error" if one_line else "traceback", f"{name!r:.200}: {error!r}"))
        except _Hang:
            found.append(("hang", f"{name!r:.200}"))
        except Exception as error:
            found.append(("traceback", f"{name!r:.200}: {error!r:.300}"))
        finally:
            signal.alarm(0)
    return found


def _ring(number, frame):
    raise _Hang


def _random_text(rng: random.Random) -> str:
    return "".join(rng.choices(_PIECES, k=rng.randint(0, 8)))


def _texts(rng: random.Random, folder: pathlib.Path, count: int, tokenizer):
    from esolm_jax.sampling.plan import prompts

    def attempt(text, length):
        prompt = prompts.parse_text(text, tokenizer, length=length)
        if len(prompts.complete(prompt, length)) != length and not prompt.is_whole:
            raise AssertionError("a prompt of another length")

    for _ in range(count):
        text, length = _random_text(rng), rng.choice((1, 16, 1024))
        yield text, lambda text=text, length=length: attempt(text, length)


def _lines(rng: random.Random, folder: pathlib.Path, count: int, tokenizer):
    from esolm_jax.sampling.plan import prompts

    path = folder / "prompts.jsonl"
    for _ in range(count):
        text = _random_text(rng)
        spans = rng.choice((*_VALUES, [[0, len(text)]], [[0, 2], [1, 3]]))
        names = rng.sample(("prompt", "text", "rewrite", "seed", "other"), k=rng.randint(0, 4))
        values = {"prompt": text, "text": text, "rewrite": spans, "seed": 3, "other": 1}
        fields = {n: values[n] if rng.random() < 0.7 else rng.choice(_VALUES) for n in names}
        line = json.dumps(fields)
        if rng.random() < 0.3:
            cut = rng.randrange(len(line) + 1)
            line = line[:cut] + rng.choice(("", "[" * 100_000, "\x00", "NaN", '{"')) + line[cut:]

        def attempt(line=line):
            path.write_text(line, encoding="utf-8", errors="surrogatepass")
            for prompt in prompts.parse_file(path, tokenizer, length=64):
                prompts.complete(prompt, 64)

        yield line, attempt


def _files(rng: random.Random, folder: pathlib.Path, count: int, tokenizer):
    from esolm_jax.sampling.plan import prompts

    os.mkfifo(folder / "fifo")
    (folder / "link").symlink_to("/dev/zero")
    (folder / "loop").symlink_to("loop")
    (folder / "empty").touch()
    (folder / "binary").write_bytes(rng.randbytes(10_000))
    with open(folder / "huge", "wb") as file:
        file.truncate(2**36)  # sparse
    names = ("fifo", "link", "loop", "empty", "binary", "huge", ".", "missing", "a" * 300)
    paths = [folder / name for name in names]
    for path in (*paths, pathlib.Path("/dev/zero"), pathlib.Path("/dev/stdin/x")):
        yield str(path), lambda path=path: prompts.parse_file(path, tokenizer, length=64)
