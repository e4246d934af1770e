"""The cost of digests: seconds added to a save and to a restore.

python -m benchmarks.reliability.digest_cost [--megabytes=200] [--rounds=5]

Saves and restores with and without digests are interleaved in one process; medians are reported.
The difference of two saves is noisy, so the time in the writer of digests is measured, too.
"""

import argparse
import contextlib
import json
import pathlib
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from unittest import mock

import jax
import jax.numpy as jnp
import optax

from esolm_jax.training import checkpoint, checkpoint_digests
from esolm_jax.training.train_state import TrainState

_META = {"config": {}, "cursor": 0, "tokenizer": {}, "version": ""}


def _state(megabytes: int) -> TrainState:
    """A random training state: weights, their average and AdamW's two moments."""
    rows = megabytes * 10**6 // 4 // 4 // 1024 // 8
    keys = jax.random.split(jax.random.key(0), 8)
    params = {f"kernel_{i}": jax.random.normal(key, (rows, 1024)) for i, key in enumerate(keys)}
    optimizer = jax.tree.map(
        lambda a: a if a.ndim == 0 else jax.random.normal(jax.random.key(1), a.shape),
        optax.adamw(1e-3).init(params),
    )
    return TrainState(
        step=jnp.int32(0),
        params=params,
        ema=jax.tree.map(lambda a: a * 0.5, params),
        opt_state=optimizer,
        key=jnp.zeros(2, jnp.uint32),
    )


@contextlib.contextmanager
def _timed_digests(seconds: list[float]) -> Iterator[None]:
    """Appends the seconds of each call that writes digests."""
    write = checkpoint_digests.write

    def timed(folder):
        begin = time.perf_counter()
        write(folder)
        seconds.append(time.perf_counter() - begin)

    with mock.patch.object(checkpoint_digests, "write", timed):
        yield


@contextlib.contextmanager
def _without_digests() -> Iterator[None]:
    with mock.patch.object(checkpoint_digests, "write", lambda folder: None):
        yield


def _save(state: TrainState, folder: pathlib.Path) -> dict[str, float]:
    """Seconds of a save: blocking the training loop, in total, and of CPU time."""
    checkpoints = checkpoint.Checkpoints(folder, keep_last=1, keep_best=0)
    checkpoints.open()
    begin, begin_cpu = time.perf_counter(), time.process_time()
    checkpoints.save(state, _META)
    blocked = time.perf_counter() - begin
    checkpoints.close()
    save, cpu = time.perf_counter() - begin, time.process_time() - begin_cpu
    return {"blocked": blocked, "save": save, "save_cpu": cpu}


def _restore(like: TrainState, folder: pathlib.Path) -> float:
    checkpoints = checkpoint.Checkpoints(folder, keep_last=1, keep_best=0)
    begin = time.perf_counter()
    restored, _ = checkpoints.restore(like)
    jax.block_until_ready(restored)
    seconds = time.perf_counter() - begin
    checkpoints.close()
    return seconds


def digest_cost(megabytes: int = 200, rounds: int = 5) -> dict:
    """Medians in seconds, with and without digests, and the time that digests add.

    Returns: state_megabytes; blocked_seconds, save_seconds, save_cpu_seconds, restore_seconds:
    {"with", "without"}; save_share, save_cpu_share, restore_share: added time relative to the time
    without digests; blocked_added_seconds: to each save, of the training loop's; digest_seconds:
    the time in the writer of digests of a save.
    """
    state = _state(megabytes)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=device), state)
    times: dict[tuple[str, str], list[float]] = {}
    writing: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(rounds + 1):  # the first one warms up
            for kind in ("with", "without") if turn % 2 else ("without", "with"):
                workdir = pathlib.Path(folder) / "run"
                shutil.rmtree(workdir, ignore_errors=True)
                # Without digests, verification is off, too.
                verify = contextlib.nullcontext() if kind == "with" else _without_verification()
                digests = _timed_digests(writing) if kind == "with" else _without_digests()
                with digests, verify:
                    seconds = _save(state, workdir)
                    seconds["restore"] = _restore(like, workdir)
                if turn:
                    for name, value in seconds.items():
                        times.setdefault((name, kind), []).append(value)
    median = {
        f"{name}_seconds": {
            kind: statistics.median(times[name, kind]) for kind in ("with", "without")
        }
        for name in ("blocked", "save", "save_cpu", "restore")
    }

    def share(name: str) -> float:
        return median[name]["with"] / median[name]["without"] - 1

    blocked = median["blocked_seconds"]
    return {
        "state_megabytes": sum(a.nbytes for a in jax.tree.leaves(state)) / 1e6,
        "rounds": rounds,
        "digest_seconds": statistics.median(writing[1:]),
        **median,
        "save_share": share("save_seconds"),
        "save_cpu_share": share("save_cpu_seconds"),
        "restore_share": share("restore_seconds"),
        "blocked_added_seconds": blocked["with"] - blocked["without"],
    }


@contextlib.contextmanager
def _without_verification() -> Iterator[None]:
    with mock.patch.object(checkpoint_digests, "problem", lambda *args, **kwargs: None):
        with mock.patch.object(checkpoint_digests, "read", lambda folder: None):
            yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    print(json.dumps({"digests": digest_cost(args.megabytes, args.rounds)}, indent=2))


if __name__ == "__main__":
    main()
