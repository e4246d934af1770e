"""Several runs in one workdir: concurrent starts of a writer, and readers during a writer."""

import functools
import json
import os
import pathlib
import shutil

from benchmarks.reliability import tiny, verbs
from benchmarks.reliability.kills import expect_success
from benchmarks.reliability.verbs import Child, Row

AT_ONCE = 3  # runs that start together


def concurrent_starts(folder: pathlib.Path, starts: int) -> list[dict]:
    """Groups of AT_ONCE `train` in one workdir: one trains, the others name it and end."""
    args = tiny.write_text(folder)
    expect_success(verbs.run("prepare", [*args, f"--workdir={folder}"]))
    expect_success(verbs.run("train", [*args, f"--workdir={folder / 'alone'}"]))
    reference = verbs.call(tiny.final_state, str(folder / "alone"))
    row = Row(f"{AT_ONCE} concurrent starts of train")
    for group in range(starts // AT_ONCE):
        workdir = folder / f"shared-{group}"
        children = [verbs.start("train", [*args, f"--workdir={workdir}"]) for _ in range(AT_ONCE)]
        ends = [child.wait(verbs.TIMEOUT) for child in children]
        same = any(ended.code == 0 for ended in ends)
        same = same and verbs.call(tiny.final_state, str(workdir)) == reference
        if not any(ended.code == 0 for ended in ends):
            row.add("silent", f"no process trained: {ends[0].err[-500:]}")
        for ended in ends:
            if ended.fault or (ended.code and not ended.is_clean_error):
                row.add(ended.fault or "traceback", ended.err[-1500:])
            elif ended.code:
                row.add("clean error")
            else:
                row.add("identical" if same else "silent", "another final state")
        shutil.rmtree(workdir)
        print(f"  {(group + 1) * AT_ONCE} of {starts} starts: {dict(row.counts)}", flush=True)
    return [row.to_json()]


def readers(folder: pathlib.Path, reads: int) -> list[dict]:
    """Evaluations and samples during a `train` that saves and deletes at every step."""
    args = tiny.write_text(folder) + ["--config.train.steps=1000000", "--config.train.keep_last=1"]
    args += ["--config.train.eval_every=1", "--config.train.checkpoint_every=1"]
    args += ["--config.eval.split=validation", "--config.eval.num_samples=1"]
    expect_success(verbs.run("prepare", [*args, f"--workdir={folder}"]))
    workdir = folder / "read"
    writer = verbs.start("train", [*args, f"--workdir={workdir}"])
    os.setpriority(os.PRIO_PROCESS, writer.pid, 19)  # it saves at every step also if it waits
    rows = []
    for what, function, share in (("evaluate", _evaluate, 0.8), ("sample", _sample, 0.2)):
        count = max(1, round(share * reads))
        reader = Child(functools.partial(function, str(workdir), count))
        ended = reader.wait(verbs.TIMEOUT + 20 * count)
        row = Row(f"{what} during a train that deletes steps")
        if ended.code != 0:
            row.add(ended.fault or "traceback", ended.err[-2000:], times=count)
        for outcome, why in ended.value or []:
            row.add(outcome, why)
        print(f"  {row.to_json()}", flush=True)
        rows.append(row.to_json())
    assert not writer.poll(), writer.wait(1).err
    writer.signal(9)
    writer.wait(30)
    return rows


def _evaluate(workdir: str, count: int) -> list[tuple[str, str]]:
    """(outcome, reason) of `count` evaluations; each must equal the value logged at its step."""
    from esolm_jax import evaluate

    def read(config, folder):
        figures = evaluate.evaluate(config, folder)
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        logged = [json.loads(line) for line in lines if "validation_nelbo" in line]
        right = {entry["step"]: entry["validation_nelbo"] for entry in logged}[figures["step"]]
        found = figures["results"][0]["nll_per_token"]
        same = abs(found - right) < 1e-6
        return ("identical", "") if same else ("silent", f"step {figures['step']}: {found}")

    return _read_often(workdir, count, read)


def _sample(workdir: str, count: int) -> list[tuple[str, str]]:
    from esolm_jax import sample

    seen: dict[int, list] = {}  # step -> its texts: two reads of a step must agree

    def read(config, folder):
        figures, _ = sample.sample(config, folder)
        texts = [row["token_ids"] for row in figures["samples"]]
        same = seen.setdefault(figures["step"], texts) == texts
        return ("identical" if same else "silent"), f"step {figures['step']}"

    return _read_often(workdir, count, read)


def _read_often(workdir: str, count: int, read) -> list[tuple[str, str]]:
    import traceback

    from esolm_jax.errors import UserError
    from esolm_jax.training import checkpoint_meta

    folder, found = pathlib.Path(workdir), []
    _await_checkpoint(folder)
    for _ in range(count):
        try:
            found.append(read(checkpoint_meta.saved_config(workdir), folder))
        except UserError as error:  # there is always a good checkpoint, so this is a fault
            found.append(("silent", f"refused: {error}"))
        except Exception:
            found.append(("traceback", traceback.format_exc()[-2000:]))
    return found


def _await_checkpoint(folder: pathlib.Path) -> None:
    import time

    checkpoints = folder / "checkpoints"
    while not (checkpoints.is_dir() and any(p.name.isdigit() for p in checkpoints.iterdir())):
        time.sleep(0.2)
