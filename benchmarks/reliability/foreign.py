"""python -m benchmarks.reliability.foreign [--count=600] [--seed=0]: `convert` on hostile files.

Files of other programs (.ckpt, .pt, safetensors, config.json, index, tokenizers): damaged, forged,
of other types, or replaced by special files. Outcomes:

  ok          the weights and the config of the undamaged file; or those of another valid file, if
              the format cannot show damage: a bit flip in safetensors' weights (no checksum), a
              pickle with a new checksum, a config.json field set to null
  clean       one line of error
  silent      other weights or another config than the file's
  traceback   any other exception, or a crash of the process
  hang        no result within 20 seconds

Each kind runs in its own process with a memory limit.
"""

import argparse
import json
import os
import pathlib
import queue
import resource
import signal
import subprocess
import sys
import tempfile
import threading
from typing import Any

COUNTS = ("ok", "clean", "silent", "traceback", "hang")
ROOT = pathlib.Path(__file__).resolve().parents[2]
SECONDS, MEMORY = 20, 2 * 2**30  # per input: time, and memory beyond that of the idle process


def run(count: int = 600, seed: int = 0, kinds: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """One row for each kind: {"kind", "inputs", "ok", …, "examples": [failures]}."""
    from benchmarks.reliability import foreign_cases as cases

    kinds = kinds or tuple(cases.KINDS)
    per_kind = max(1, count // len(kinds))
    return [_row(kind, _results(kind, per_kind, seed)) for kind in kinds]


def _row(kind: str, results: list[dict]) -> dict[str, Any]:
    row: dict[str, Any] = {"kind": kind, "inputs": len(results)}
    row |= {name: sum(result["how"] == name for result in results) for name in COUNTS}
    wrong = [r for r in results if r["how"] not in ("ok", "clean")]
    return row | {"examples": [f"{r['what']}: {r['told']}" for r in wrong[:5]]}


def _results(kind: str, count: int, seed: int) -> list[dict]:
    """Starts the worker, and restarts it after an input that ended it."""
    results: list[dict] = []
    while True:
        done = len(results)
        args = [kind, str(count), str(seed), str(done)]
        command = [sys.executable, "-m", "benchmarks.reliability.foreign", "--worker", *args]
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
        worker = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        ended = _follow(worker, results)
        if ended is None:
            return results
        results.append({"what": f"input {len(results)}", "how": ended[0], "told": ended[1]})
        if len(results) > 10_000:
            return results


def _follow(worker: subprocess.Popen, results: list[dict]) -> tuple[str, str] | None:
    """Collects a worker's results; (outcome, reason) if it did not finish."""
    lines: queue.Queue = queue.Queue()

    def read() -> None:
        for line in worker.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    errors: list[str] = []
    threading.Thread(target=lambda: errors.extend(worker.stderr), daemon=True).start()
    limit = 300  # to start
    while True:
        try:
            line = lines.get(timeout=limit)
        except queue.Empty:
            worker.kill()
            worker.wait()
            return "hang", f"silent for {limit} s"
        limit = 3 * SECONDS
        if line is None:
            break
        if line.startswith("{"):
            results.append(json.loads(line))
    if worker.wait() == 0:
        return None
    return "traceback", f"exit code {worker.returncode}: {''.join(errors)[-300:]}"


class _TooLong(BaseException):
    pass


def _alarm(*_):
    raise _TooLong


def _work(kind: str, count: int, seed: int, start: int) -> None:
    from benchmarks.reliability import foreign_cases as cases

    signal.signal(signal.SIGALRM, _alarm)
    with tempfile.TemporaryDirectory() as folder:
        inputs = cases.Inputs(pathlib.Path(folder), seed)
        inputs.warm_up(kind)
        _bound_memory()
        for i in range(start, cases.number(kind, count)):
            case = inputs.make(kind, i)
            print(json.dumps({"what": case.what} | _take(inputs, case)), flush=True)


def _bound_memory() -> None:
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _take(inputs, case) -> dict[str, str]:
    from esolm_jax.errors import UserError

    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        result = inputs.load(case)
    except UserError as error:
        message = str(error)
        is_clean = message.isprintable() and len(message) < 3000 and "MemoryError" not in message
        return {"how": "clean" if is_clean else "traceback", "told": ascii(message[:300])}
    except _TooLong:
        return {"how": "hang", "told": ""}
    except BaseException as error:
        return {"how": "traceback", "told": ascii(f"{type(error).__name__}: {error}"[:300])}
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    told = inputs.difference(case, result)
    return {"how": "silent" if told else "ok", "told": told}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default="")
    parser.add_argument("--worker", nargs=4)
    args = parser.parse_args()
    if args.worker:
        kind, *numbers = args.worker
        _work(kind, *map(int, numbers))
        return
    for row in run(args.count, args.seed, tuple(filter(None, args.kinds.split(",")))):
        print(json.dumps(row))


if __name__ == "__main__":
    main()
