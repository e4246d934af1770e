"""python -m benchmarks.zeroshot: the figures of `evaluate --suite=zeroshot` do not depend on how.

Writes invented texts in the published format of every data set of the suite, a GPT-2-like tokenizer
and a small Eso-LM (B), in a temporary folder. Runs `evaluate --suite=zeroshot` in processes of its
own: killed while it prepares and again while it evaluates, on 1 and on 8 fake CPU devices, with
batches of 1, 3 and 64 windows, with both protocols. Writes docs/zeroshot_check.{json,md}; exit code
1 if any two figures that must agree differ by more than a relative 1e-6. Needs no network;
--quick makes fewer runs, of less text.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

from benchmarks import report_writer, zeroshot_files, zeroshot_page

ROOT = pathlib.Path(__file__).parents[1]
KILLED_AFTER = 3  # data sets
PUBLISHED_WINDOWS = 98  # 98 = 3 · 32 + 2 = 64 + 34: no last batch of one window
MODEL = {
    "data.seq_len": 64,
    "data.tokenizer_ids": 0,
    "model.width": 32,
    "model.blocks": 2,
    "model.heads": 2,
    "model.cond_width": 16,
    "model.dropout": 0.0,
    "model.dtype": "float32",
    "model.remat": "none",
    "optimizer.learning_rate": 3e-3,
    "optimizer.warmup_steps": 20,
    "train.batch_size": 32,
    "train.grad_accumulation": 1,
    "train.eval_windows": 32,
    "eval.num_orders": 2,
    "mesh.fsdp": 1,
    "mesh.devices": 1,
}


@dataclasses.dataclass(frozen=True)
class Run:
    """One evaluation; `reference` names the run whose figures it must have."""

    protocol: str
    batch_size: int
    devices: int = 1
    killed: bool = False
    reference: "Run | None" = None

    @property
    def name(self) -> str:
        ending = "-killed" if self.killed else ""
        return f"{self.protocol}-{self.batch_size}-{self.devices}{ending}"


def runs(quick: bool) -> list[Run]:
    """References before what is compared with them."""
    whole, published = Run("all", 64), [Run("published", size) for size in (64, 3)]
    made = [whole, Run("all", 64, killed=True, reference=whole)]
    if quick:
        return [*made, Run("all", 3, 8, reference=whole)]
    sizes = [(size, devices) for devices in (1, 8) for size in (1, 3, 64)]
    made += [Run("all", *each, reference=whole) for each in sizes if each != (64, 1)]
    made += published
    made += [Run("published", 64, killed=True, reference=published[0])]
    return made + [Run("published", one.batch_size, 8, reference=one) for one in published]


@dataclasses.dataclass(frozen=True)
class Model:
    """A workdir with a checkpoint, and the folder of the data sets."""

    workdir: pathlib.Path
    data_root: pathlib.Path

    @property
    def suite(self) -> pathlib.Path:
        return self.workdir / "suites" / "zeroshot"


def verb(name: str, *args: str, devices: int = 1) -> list:
    """Arguments of subprocess.Popen: command and environment of a verb."""
    fake = f"--xla_force_host_platform_device_count={devices}"
    flags = f"{os.environ.get('XLA_FLAGS', '')} {fake}".strip()
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": paths}
    return [sys.executable, "-m", f"esolm_jax.{name}", *args], env


def call(name: str, *args: str, devices: int = 1) -> subprocess.CompletedProcess:
    """Runs a verb to its end."""
    command, env = verb(name, *args, devices=devices)
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)


def expect_success(done: subprocess.CompletedProcess) -> str:
    """What the verb printed; ends this benchmark if it failed."""
    if done.returncode:
        sys.exit(f"{' '.join(done.args)}: exit code {done.returncode}\n{done.stderr}")
    return done.stdout


def make_model(folder: pathlib.Path, scale: int, steps: int) -> Model:
    """Files, tokenizer and a briefly trained model: random weights would not read their context."""
    model = Model(folder / "run", folder / "data_root")
    texts = zeroshot_files.training_texts(8 * scale)
    zeroshot_files.write(model.data_root, scale)
    zeroshot_files.write_tokenizer(folder / "gpt2", texts, size=400)
    zeroshot_files.write_json_lines(folder / "text" / "train.jsonl", texts)
    fields = MODEL | {
        "data.train": folder / "text" / "train.jsonl",
        "data.validation": "",
        "data.test": "",
        "data.tokenizer_path": folder / "gpt2",
        "train.steps": steps,
        "train.eval_every": steps,
        "train.checkpoint_every": steps,
    }
    given = [f"--config={ROOT}/configs/owt.py:0.5", f"--workdir={model.workdir}"]
    given += [f"--config.{name}={value}" for name, value in fields.items()]
    for name in ("prepare", "train"):
        expect_success(call(name, *given))
    return model


def evaluate_args(model: Model, run: Run) -> list[str]:
    args = [f"--workdir={model.workdir}", "--suite=zeroshot", f"--data_root={model.data_root}"]
    args += [f"--protocol={run.protocol}", f"--config.eval.batch_size={run.batch_size}"]
    args += [f"--config.mesh.devices={run.devices}", "--config.mesh.data=-1"]
    args += [f"--config.mesh.fsdp={2 if run.devices > 1 else 1}"]  # 8 devices: data=4, fsdp=2
    if run.protocol == "published":
        args.append(f"--config.eval.max_windows={PUBLISHED_WINDOWS}")
    return args


def evaluate(model: Model, run: Run, results: pathlib.Path) -> dict:
    """Runs `evaluate`; its report, and what was done before each kill."""
    kills = []
    if run.killed:  # from the beginning, with data that are not prepared yet
        shutil.rmtree(model.suite)
        kills = [kill(model, run, pattern) for pattern in ("data/*/manifest.json", "*/*.json")]
    begin = time.monotonic()
    args = evaluate_args(model, run)
    out = expect_success(call("evaluate", *args, devices=run.devices))
    seconds = time.monotonic() - begin
    report = json.loads((model.suite / run.protocol / "report.json").read_text())
    shutil.move(model.suite / run.protocol, results / run.name)  # so the next run does it again
    done = re.findall(r"^(.+): done before \(", out, re.MULTILINE)
    return {"report": report, "done_before": done, "kills": kills, "seconds": seconds}


def kill(model: Model, run: Run, pattern: str) -> dict:
    """Starts `evaluate` and kills it as soon as KILLED_AFTER files of its suite match `pattern`."""
    command, env = verb("evaluate", *evaluate_args(model, run), devices=run.devices)
    with tempfile.TemporaryFile() as log:
        child = subprocess.Popen(command, env=env, cwd=ROOT, stdout=log, stderr=log)
        while len(set(model.suite.glob(pattern))) < KILLED_AFTER and child.poll() is None:
            time.sleep(0.005)
        child.send_signal(signal.SIGKILL)
        if child.wait() != -signal.SIGKILL:
            log.seek(0)
            sys.exit(f"{' '.join(command)}: ended before it was killed\n{log.read().decode()}")
    entries = [json.loads(path.read_text()) for path in model.suite.glob(f"{run.protocol}/*.json")]
    return {
        "prepared": len(list(model.suite.glob("data/*/manifest.json"))),
        "evaluated": sorted(one["entry"]["title"] for one in entries),
    }


def measure(folder: pathlib.Path, quick: bool) -> dict:
    """All runs, in a folder that is empty."""
    model = make_model(folder, *((160, 60) if quick else (500, 400)))
    reports: dict[str, dict] = {}
    rows = []
    (folder / "results").mkdir()
    for run in runs(quick):
        found = evaluate(model, run, folder / "results")
        reports[run.name] = found["report"]
        wanted = reports[run.reference.name] if run.reference else None
        row = dataclasses.asdict(run) | found | {"name": run.name}
        row["reference"] = run.reference.name if run.reference else None
        differ = zeroshot_page.largest_differences
        row["differences"] = differ(found["report"], wanted) if wanted else None
        row["agrees"] = zeroshot_page.agrees(row)
        rows.append(row)
        shown = ("name", "differences", "done_before", "kills", "seconds", "agrees")
        print({key: row[key] for key in shown}, flush=True)
    refused = None if quick else refusal(model)
    return {"runs": rows, "refused": refused, "published_windows": PUBLISHED_WINDOWS}


def refusal(model: Model) -> dict:
    """`evaluate` with batches of one window, which the published protocol cannot split."""
    run = Run("published", 1)
    done = call("evaluate", *evaluate_args(model, run))
    line = next((x for x in done.stderr.splitlines() if x.startswith("error")), "")
    return {"batch_size": 1, "exit_code": done.returncode, "message": line}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer runs, of less text")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("docs/zeroshot_check"))
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = measure(pathlib.Path(folder), a.quick)
    report_writer.write(a.out, zeroshot_page.brief(report), zeroshot_page.page(report))
    if not zeroshot_page.is_right(report):
        sys.exit("error: figures that must agree do not; see the table")


if __name__ == "__main__":
    main()
