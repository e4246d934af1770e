"""SIGKILL at random moments: does the same command resume to the same numbers?

A run is killed repeatedly: after a random time, while a checkpoint is being written (its temporary
folder exists), or after a number of logged steps. Then it finishes, and its state and metrics are
compared bit for bit with those of an undisturbed run.
"""

import pathlib
import random
import shutil
import signal
import socket
import time

from benchmarks.reliability import tiny, verbs
from benchmarks.reliability.verbs import Child, Ended, Row

PER_RUN = 6  # kills before a run may finish
_HEARTBEAT = 10  # seconds of silence after which a process counts as dead
_MEETING = 20  # seconds for both to meet; a peer that dies before is missed only then


def one_process(folder: pathlib.Path, kills: int, seed: int = 0) -> list[dict]:
    args = tiny.write_text(folder)
    expect_success(verbs.run("prepare", [*args, f"--workdir={folder}"]))
    reference = _reference(folder / "alone", args)
    rng, row, done = random.Random(seed), Row("SIGKILL, one process"), 0
    while done < kills:
        workdir = folder / f"killed-{done}"
        killed = 0
        while killed < min(PER_RUN, kills - done):
            child = verbs.start("train", [*args, f"--workdir={workdir}"])
            if not _await_moment(rng, child, workdir):
                break  # it finished before
            child.signal(signal.SIGKILL)
            child.wait(30)
            killed += 1
        outcome, why = _finish(workdir, args, reference)
        row.add(outcome, f"seed {seed}, run {workdir.name}: {why}", times=killed)
        done += killed
        print(f"  {done} of {kills} kills: {dict(row.counts)}", flush=True)
        shutil.rmtree(workdir)
    return [row.to_json()]


def two_processes(folder: pathlib.Path, kills: int, seed: int = 0) -> list[dict]:
    """Each kill ends one process, 0 or 1 in turn; the other must end with one line."""
    args = tiny.write_text(folder) + [f"--config.distributed.heartbeat_timeout={_HEARTBEAT}"]
    args += [f"--config.distributed.init_timeout={_MEETING}"]
    expect_success(verbs.run("prepare", [*args, f"--workdir={folder}"]))
    workdir = folder / "alone"
    for ended in [
        child.wait(verbs.TIMEOUT) for child in _start_two([*args, f"--workdir={workdir}"])
    ]:
        expect_success(ended)
    reference = verbs.call(tiny.final_state, str(workdir))
    rng = random.Random(seed)
    row, survivors, done = Row("SIGKILL, one of two processes"), Row("the survivor"), 0
    while done < kills:
        workdir, killed = folder / f"killed-{done}", 0
        while killed < min(PER_RUN, kills - done):
            pair = _start_two([*args, f"--workdir={workdir}"])
            victim = (done + killed) % 2
            if not _await_moment(rng, pair[victim], workdir):
                [child.wait(verbs.TIMEOUT) for child in pair]
                break
            pair[victim].signal(signal.SIGKILL)
            pair[victim].wait(30)
            begin = time.monotonic()
            ended = pair[1 - victim].wait(_MEETING + 60)
            seconds = time.monotonic() - begin
            survivors.add(*_survivor(ended, victim, seconds))
            killed += 1
        ends = [child.wait(verbs.TIMEOUT) for child in _start_two([*args, f"--workdir={workdir}"])]
        outcome, why = _compare(ends, workdir, reference)
        row.add(outcome, f"seed {seed}, run {workdir.name}: {why}", times=killed)
        done += killed
        print(f"  {done} of {kills} kills of one of two: {dict(row.counts)}", flush=True)
        shutil.rmtree(workdir)
    return [row.to_json(), survivors.to_json()]


def _survivor(ended: Ended, victim: int, seconds: float) -> tuple[str, str]:
    """How the other process ended when `victim` was killed."""
    example = f"process {victim} killed, {seconds:.0f} s, code {ended.code}: {ended.err[-400:]}"
    if ended.fault:
        return ended.fault, example
    if seconds > (_MEETING if "init_timeout" in ended.err else _HEARTBEAT) + 10:
        return "hang", example
    return ("clean error" if ended.is_clean_error else "silent"), example


def _start_two(args: list[str]) -> list[Child]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": "2"}
    return [
        verbs.start("train", args, environment | {"JAX_PROCESS_ID": str(index)})
        for index in range(2)
    ]


def _await_moment(rng: random.Random, child: Child, workdir: pathlib.Path) -> bool:
    """Waits for a random moment to kill. False: the process ended before."""
    kind = rng.choice(("time", "save", "steps"))
    seconds, least = rng.uniform(0.0, 6.0), rng.randint(1, 12)
    pause, begin = rng.uniform(0.0, 0.05), time.monotonic()
    before = _num_lines(workdir)
    while not child.poll():
        if time.monotonic() - begin > 60:
            return True
        if kind == "time" and time.monotonic() - begin > seconds:
            return True
        if kind == "save" and any((workdir / "checkpoints").glob("*tmp*")):
            time.sleep(pause)
            return not child.poll()
        if kind == "steps" and _num_lines(workdir) >= before + least:
            time.sleep(pause)
            return not child.poll()
        time.sleep(0.001)
    return False


def _num_lines(workdir: pathlib.Path) -> int:
    path = workdir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _reference(workdir: pathlib.Path, args: list[str]) -> dict:
    expect_success(verbs.run("train", [*args, f"--workdir={workdir}"]))
    return verbs.call(tiny.final_state, str(workdir))


def _finish(workdir: pathlib.Path, args: list[str], reference: dict) -> tuple[str, str]:
    ended = verbs.run("train", [*args, f"--workdir={workdir}"])
    return _compare([ended], workdir, reference)


def _compare(ends: list[Ended], workdir, reference: dict) -> tuple[str, str]:
    for ended in ends:
        if ended.fault:
            return ended.fault, ended.err[-2000:]
        if ended.code:
            kind = "clean error" if ended.is_clean_error else "traceback"
            return kind, ended.err[-2000:]
    found = verbs.call(tiny.final_state, str(workdir))
    return ("identical", "") if found == reference else ("silent", f"{found} != {reference}")


def expect_success(ended: Ended) -> None:
    """RuntimeError unless it ended with exit code 0."""
    if ended.code != 0:
        raise RuntimeError(f"code {ended.code}: {ended.out[-500:]}{ended.err[-2000:]}")
