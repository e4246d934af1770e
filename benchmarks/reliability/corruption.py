"""Damages files of a workdir: is it detected, and does the run fall back?

Each attempt copies a workdir with three checkpoints and prepared data, damages one file, runs
evaluate, sample or train, and compares the result with that of the undamaged workdir.
"""

import json
import pathlib
import random
import re
import shutil

from benchmarks.reliability import tiny, verbs
from benchmarks.reliability.kills import expect_success
from benchmarks.reliability.verbs import Ended, Row

STEPS, MORE = 12, 16  # steps of the workdir, and after `train` resumes
SAID = re.compile("damaged|cannot be read|falling back|fall back|missing|kept beside", re.I)
NOT_READ = ("tensorboard", "learning_curve.png", "evaluate.json", "evaluations.jsonl", "samples.")


def _flip(rng: random.Random, path: pathlib.Path) -> None:
    data = bytearray(path.read_bytes())
    if data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def _garbage(rng: random.Random, path: pathlib.Path) -> None:
    data = bytearray(path.read_bytes())
    start = rng.randrange(max(1, len(data)))
    data[start : start + rng.randint(1, 64)] = rng.randbytes(rng.randint(1, 64))
    path.write_bytes(data)


def _truncate(rng: random.Random, path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[: rng.randrange(max(1, path.stat().st_size))])


def _empty(rng: random.Random, path: pathlib.Path) -> None:
    path.write_bytes(b"")


def _replace(rng: random.Random, path: pathlib.Path) -> None:
    path.write_bytes(rng.randbytes(rng.choice((1, 100, path.stat().st_size + 1))))


def _append(rng: random.Random, path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes() + rng.randbytes(rng.randint(1, 100)))


def _delete(rng: random.Random, path: pathlib.Path) -> None:
    path.unlink()


def _folder(rng: random.Random, path: pathlib.Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES = {
    "bit flip": _flip,
    "garbage": _garbage,
    "truncated": _truncate,
    "empty": _empty,
    "replaced": _replace,
    "appended": _append,
    "deleted": _delete,
    "a folder in its place": _folder,
}


def kind_of(path: pathlib.Path) -> str:
    """A file's kind: its path in a workdir without numbers and hashes."""
    parts = ["<step>" if part.isdigit() else part for part in path.parts]
    name = re.sub(r"[0-9a-f]{16,}", "<hash>", parts[-1])
    name = re.sub(r"\d+", "<n>", name)
    return "/".join([*parts[:-1], name])


def run(folder: pathlib.Path, attempts: int, seed: int = 0) -> list[dict]:
    """Rows by kind of file: checkpoint items, prepared data, other files of the workdir."""
    args = [arg for arg in tiny.write_text(folder / "text") if "data.dir" not in arg]
    args += [f"--config.train.steps={STEPS}"]
    original = folder / "original"
    for verb in ("prepare", "train"):
        expect_success(verbs.run(verb, [*args, f"--workdir={original}"]))
    tries = _Tries(folder, original, args)
    rng, rows = random.Random(seed), {}
    kinds: dict[str, list[pathlib.Path]] = {}
    for path in sorted(original.rglob("*")):
        inside = path.relative_to(original)
        if path.is_file() and not str(inside).startswith(NOT_READ):
            kinds.setdefault(kind_of(inside), []).append(inside)
    for i in range(attempts):
        kind = list(kinds)[i % len(kinds)]
        # The newest step half of the time, else any: damage to older ones is not read.
        inside = kinds[kind][-1] if rng.random() < 0.5 else rng.choice(kinds[kind])
        name = rng.choice(list(DAMAGES))
        verb = ("evaluate", "train", "sample")[(i // len(kinds) + i) % 3]
        outcome, why = tries.attempt(verb, inside, name, rng)
        row = rows.setdefault(_group(kind), Row(f"damage to {_group(kind)}"))
        row.add(outcome, f"{verb}, {inside}, {name} (seed {seed}, attempt {i}): {why}")
        if outcome in ("silent", "traceback", "hang"):
            print(f"  {outcome}: {verb}, {inside}, {name}: {why[-1500:]}", flush=True)
        if i % 20 == 19:
            print(f"  {i + 1} of {attempts} corruptions", flush=True)
    print(f"  {len(kinds)} kinds of files", flush=True)
    return [row.to_json() for row in rows.values()]


def _group(kind: str) -> str:
    parts = kind.split("/")
    if parts[0] == "checkpoints":
        items = ("params", "ema", "optimizer", "meta", "metrics")
        item = next((part for part in parts[1:] if part in items), "the step's own files")
        return f"checkpoints: {item}"
    return {"data": "prepared data", "tokenizer": "WORKDIR/tokenizer"}.get(parts[0], parts[0])


class _Tries:
    """Runs verbs on damaged copies and compares with the right results of each step."""

    def __init__(self, folder: pathlib.Path, original: pathlib.Path, args: list[str]):
        self._original, self._args, self._copy = original, args, folder / "copy"
        self._right: dict[str, dict[int, object]] = {"evaluate": {}, "sample": {}}
        steps = sorted(
            int(p.name) for p in (original / "checkpoints").iterdir() if p.name.isdigit()
        )
        for step in steps:
            self._fresh_copy()
            for later in (other for other in steps if other > step):
                shutil.rmtree(self._copy / "checkpoints" / str(later))
            for verb, right in self._right.items():
                expect_success(verbs.run(verb, [f"--workdir={self._copy}"]))
                right[step] = self._result(verb)
        self._fresh_copy()
        expect_success(self._run("train"))
        self._final = self._result("train")
        self._latest = steps[-1]

    def _fresh_copy(self) -> None:
        shutil.rmtree(self._copy, ignore_errors=True)
        shutil.copytree(self._original, self._copy)

    def _run(self, verb: str) -> Ended:
        own = [*self._args, f"--config.train.steps={MORE}"] if verb == "train" else []
        return verbs.run(verb, [*own, f"--workdir={self._copy}"])

    def _result(self, verb: str):
        if verb == "train":
            return verbs.call(tiny.final_state, str(self._copy), timeout=300)["sha256"]
        if verb == "evaluate":
            figures = json.loads((self._copy / "evaluate.json").read_text())
            return [row["nll_per_token"] for row in figures["results"]]
        lines = (self._copy / "samples.jsonl").read_text().splitlines()
        return [json.loads(line)["token_ids"] for line in lines]

    def attempt(self, verb: str, inside: pathlib.Path, damage: str, rng) -> tuple[str, str]:
        """(outcome, why) of a verb after damage to one file."""
        self._fresh_copy()
        before = (self._copy / inside).read_bytes()
        while True:  # some damage has no effect, such as truncating an empty file
            DAMAGES[damage](rng, self._copy / inside)
            path = self._copy / inside
            if not path.is_file() or path.read_bytes() != before:
                break
            damage = "appended"
        ended = self._run(verb)
        if ended.fault:
            return ended.fault, ended.err[-3000:]
        said = ended.out + ended.err
        if ended.code:
            return ("clean error" if ended.is_clean_error else "traceback"), said[-3000:]
        found = self._result(verb)
        if verb == "train":
            if found != self._final:
                return "silent", "another final state"
            return ("fell back" if SAID.search(said) else "identical"), ""
        right = self._right[verb]
        if found == right[self._latest]:
            return ("fell back" if SAID.search(said) else "identical"), ""
        if found in right.values() and SAID.search(said):
            return "fell back", ""
        return "silent", f"{found}; right is {right}; printed: {said[-500:]}"
