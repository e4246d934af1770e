"""python -m benchmarks.published_evaluation --published=DIR --python=PATH: both codes evaluate.

DIR is a clone of the published Eso-LMs code; --bd3lms=DIR adds that of BD3-LM. PATH is a Python
with torch and the packages of their requirements.txt. For each tiny model with random weights, the
published code trains two steps, writes its Lightning checkpoint, and evaluates it on local text
files in the formats of the published data sets (published_validation.py). Our code converts the
checkpoint, prepares the same files and evaluates it by the published protocol, with the masks,
times and orders that were drawn there (published_evaluation_ours.py). Windows must be equal, and
the NELBO of each window and of the whole must agree to a relative 1e-5. Writes
docs/published_evaluation.{json,md}; exits with 1 if anything differs.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence

import numpy as np
from pyarrow import parquet

from benchmarks import published_evaluation_cases as cases_lib
from benchmarks import published_evaluation_ours as ours
from benchmarks import report_writer
from benchmarks.published_evaluation_cases import Case
from benchmarks.published_evaluation_record import Outcome, Record
from esolm_jax.evaluation.suite import suite_file

TOLERANCE = 1e-5  # relative
SCRIPTS = {  # by whether the code is BD3-LM's
    False: pathlib.Path(__file__).with_name("published_validation.py"),
    True: pathlib.Path(__file__).with_name("published_validation_bd3.py"),
}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One case: our figures and the published ones.

    Attributes:
      differing_windows: how many windows differ in an id or in the attention mask.
      window, batch, total: largest relative differences of the nats of a window, of the loss of a
        batch, and of the NELBO of the whole.
      differing_counts: batches whose number of tokens differs.
    """

    model: str
    data: str
    windows: int
    differing_windows: int
    differing_counts: int
    window: float
    batch: float
    total: float
    published_nll: float
    our_nll: float

    @property
    def agrees(self) -> bool:
        exact = not self.differing_windows and not self.differing_counts
        return exact and max(self.window, self.batch, self.total) <= TOLERANCE


def _relative(got: Sequence, want: Sequence) -> float:
    """The largest relative difference; inf if the shapes differ."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    if got.shape != want.shape:
        return float("inf")
    scale = np.maximum(np.abs(want), np.finfo(np.float32).tiny)
    return float(np.max(np.abs(got - want) / scale, initial=0.0))


def _differing(got: tuple, want: tuple) -> int:
    """How many windows differ, in an id or in the mask; all if their numbers differ."""
    if got[0].shape != want[0].shape:
        return max(len(got[0]), len(want[0]))
    return int(sum((a != b).any(axis=1) for a, b in zip(got, want, strict=True)).astype(bool).sum())


def compare(case: Case, record: Record, outcome: Outcome) -> Comparison:
    counts = [batch.num_tokens for batch in outcome.sums]
    wanted = [int(batch["tokens"]) for batch in record.batches]
    rows = [np.concatenate(nll) for nll in (outcome.window_nll, record.window_nll())]
    losses = [float(batch["loss"]) for batch in record.batches]
    kind = case.data + (", shuffled" if case.shuffle else "")
    return Comparison(
        model=case.model.name,
        data=kind + (f", num_proc={case.processes}" if case.processes > 1 else ""),
        windows=len(record.windows),
        differing_windows=_differing(
            (outcome.windows, outcome.valid), (record.windows, record.valid)
        ),
        differing_counts=sum(a != b for a, b in zip(counts, wanted, strict=False))
        + abs(len(counts) - len(wanted)),
        window=_relative(*rows),
        batch=_relative([batch.loss for batch in outcome.sums], losses),
        total=_relative([outcome.nll], [record.final["nll"]]),
        published_nll=record.final["nll"],
        our_nll=outcome.nll,
    )


def run_published(python, directory: pathlib.Path, work: pathlib.Path, cases, files) -> None:
    """Fills a folder with the records of the published code, and its checkpoints."""
    models = list(dict.fromkeys(case.model for case in cases))
    caches = [model.folder for model in models if model.tokenizer == "text8"]
    caches += [case.name for case in cases if case.data == "text8"]
    cases_lib.write_text8(work.parent, [work / "cache" / name for name in caches])
    cases_lib.write_bert(work)
    request = {
        "files": files,
        "tokenizer": str(cases_lib.GPT2),
        "threads": 1,
        "models": {model.folder: [*model.data, *model.options] for model in models},
        "cases": {case.name: case.request() for case in cases},
    }
    script = SCRIPTS[cases[0].model.is_bd3]
    command = [str(python), str(script), str(directory.resolve())]
    environment = os.environ | {"PYTHONPATH": str(script.parent)}
    text, path = json.dumps(request), work / "published.log"
    with open(path, "w") as log:
        done = subprocess.run(
            command, input=text, text=True, cwd=work, env=environment, stdout=log, stderr=log
        )
    if done.returncode:
        print(path.read_text()[-4000:], file=sys.stderr)
        raise SystemExit(f"the published code failed with {done.returncode}: see above")


def run_ours(folder: pathlib.Path, cases, published: pathlib.Path, files) -> list[Comparison]:
    """Comparisons of all cases."""
    found: list[Comparison] = []
    for model in dict.fromkeys(case.model for case in cases):
        mine = [case for case in cases if case.model == model]
        records = {case: Record.read(published / f"{case.name}.npz") for case in mine}
        outcomes = _outcomes(folder, model, records, published, files)
        found += [compare(case, records[case], outcomes[case]) for case in mine]
        print(f"ours: {model.name}: {sum(one.agrees for one in found)} of {len(found)} agree")
    return found


def _outcomes(folder, model, records: dict[Case, Record], published, files) -> dict[Case, Outcome]:
    checkpoint = published / model.folder / "checkpoints" / "last.ckpt"
    if any(case.data == "lm1b padded" for case in records):
        ((case, record),) = records.items()
        texts = parquet.read_table(files["lm1b"])["text"].to_pylist()
        return {case: ours.evaluate_padded(checkpoint, texts, record)}
    made = ours.Converted.of(checkpoint, folder / "ours" / model.folder, model.tokenizer)
    outcomes, groups = {}, {}
    for case, record in records.items():
        if case.data == "text8":
            manifest = ours.prepare_text8(made, published.parent / "text8.zip")
            outcomes[case] = ours.evaluate_prepared(made, manifest, record)
        elif case.shuffle:
            manifest = ours.prepared(made, folder / "data", _suite(folder, case), case.data)
            outcomes[case] = ours.evaluate_prepared(made, manifest, record)
        else:
            suite = _suite(folder, case)
            groups.setdefault((suite.name, case.processes), (suite, {}))[1][case] = record
    for (_, shards), (suite, group) in groups.items():
        named = {ours.suite_name(case): record for case, record in group.items()}
        done = ours.evaluate_suite(made, folder / "data", suite, named, shards)
        outcomes |= {case: done[ours.suite_name(case)] for case in group}
    return outcomes


def _suite(folder: pathlib.Path, case: Case) -> suite_file.Suite:
    """The suite that has a case's data set: the zero-shot table, or one of the data sets that the
    published models are trained on."""
    if case.data in cases_lib.ZERO_SHOT:
        return suite_file.read("zeroshot")
    (folder / "own").mkdir(exist_ok=True)
    path = folder / "own" / f"{ours.suite_name(case)}.toml"
    path.write_text(ours.SUITES[ours.suite_name(case)])
    return suite_file.read(str(path))


# The page.


def _git(directory: pathlib.Path, *command: str) -> str:
    done = subprocess.run(["git", "-C", directory, *command], capture_output=True, text=True)
    return done.stdout.strip()


def published_commit(directory: pathlib.Path) -> str:
    """The commit of a clone, and whether its files have changed."""
    commit = _git(directory, "rev-parse", "--short", "HEAD") or "unknown"
    changed = _git(directory, "status", "--porcelain", "--untracked-files=no")
    return commit + (" with changes" if changed else "")


def packages(published: pathlib.Path) -> dict[str, str]:
    """Versions, of the published code's process first."""
    ours_ = {name: importlib.metadata.version(name) for name in ("jax", "numpy")}
    theirs = json.loads((published / "versions.json").read_text())
    return theirs | ours_ | {"python": platform.python_version()}


def _page(found: list[Comparison], commits: list[str], versions: dict[str, str]) -> str:
    agree = sum(one.agrees for one in found)
    windows = sum(one.windows for one in found)
    listed = ", ".join(f"{name} {value}" for name, value in versions.items())
    head = ["model, α₀", "data", "windows", "differ", "window", "batch", "total"]
    head += ["NELBO, published", "NELBO, ours", "agrees"]
    rows = [
        [
            one.model,
            one.data,
            one.windows,
            one.differing_windows,
            *(f"{value:.1e}" for value in (one.window, one.batch, one.total)),
            f"{one.published_nll:.6f}",
            f"{one.our_nll:.6f}",
            "yes" if one.agrees else "NO",
        ]
        for one in found
    ]
    return f"""# Evaluation by the published code and by ours

Made by `python -m benchmarks.published_evaluation --published=DIR --bd3lms=DIR2 --python=PATH`; DIR
is a clone of the published Eso-LMs code at commit {commits[0]}, DIR2 of the BD3-LM code at
{commits[1] if len(commits) > 1 else "no commit: not given"}.

{agree} of {len(found)} cases agree, on {windows:,} windows. A case agrees if all windows and their
masks are equal bit for bit, token counts are equal, and the NELBO of each window, the loss of each
batch and the NELBO of the whole differ by at most a relative {TOLERANCE:.0e}. Both codes ran in
float32 on a CPU.

- **Models**: {cases_lib.LENGTH} tokens, width 32, 2 blocks, random weights; the EMA, which both
  codes evaluate, has others. The published `main._train` ran two steps and wrote the Lightning
  checkpoint.
- **Published side**: `main._eval_ppl` with the published data loader, loss and metrics, and the
  options of its zero-shot script.
- **Our side**: `convert`, then `evaluate --suite --protocol=published`; the zero-shot data sets are
  those of `--suite=zeroshot`. The cases of text8 and of shuffled windows call the same bound on
  prepared data. Only the noise is not ours: windows are labelled with the masks, times and orders
  that the published code drew.
- **Texts**: invented, in the files and columns of the published data sets.

{report_writer.table(head, rows)}
NELBO: nats per token. window, batch, total: the largest relative difference of the nats of a window
(of the term that it feeds), of the loss of a batch, and of the NELBO of the whole.

## What was replaced in the published code

From outside, without a change to a file:

- Data sets are local files; the loader would download them. The hub's name of BERT's tokenizer is a
  local folder.
- FlexAttention is PyTorch's fused attention with the published masks, which are made on the CPU.
  BD3-LM has attention of its own for CPUs; its documents are cut by one process, not one per CPU.
- It is told that there is one GPU, where it counts them; Lightning runs on the CPU.
- float32 in place of bfloat16; no wandb.
- Windows are not shuffled, but in the case that says so: published validation during training does
  not shuffle, `ppl_eval` does. In that case our batches were given the published order.

## What was not compared

- The importance-weighted bound, which that code computes on GPUs only: tests compare it with
  vectors ([evaluation_protocol.md](evaluation_protocol.md)).
- Padded windows through `evaluate`, where other tokens do not read padding: that case ran through
  `load_published`, `protocol.windows_with_mask` and `published_nelbo.py`.
- bfloat16, several devices, and the real data sets and tokenizers.

Packages: {listed}.

Recorded at commit {report_writer.commit()} on {report_writer.machine()}.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--published", type=pathlib.Path, required=True)
    parser.add_argument("--bd3lms", type=pathlib.Path, help="A clone of the BD3-LM code, too.")
    parser.add_argument("--python", type=pathlib.Path, default=pathlib.Path(sys.executable))
    parser.add_argument("--models", default="", help="Only models with this in their name.")
    parser.add_argument("--out", type=pathlib.Path, default="docs/published_evaluation")
    args = parser.parse_args()
    sources = {args.published: cases_lib.cases(cases_lib.models())}
    if args.bd3lms:
        sources[args.bd3lms] = cases_lib.bd3_cases(cases_lib.bd3_models())
    found, commits, versions = [], [], {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        files = cases_lib.write_texts(folder / "data")
        for directory, all_cases in sources.items():
            cases = [case for case in all_cases if args.models in case.model.name]
            if cases:
                work = folder / f"code-{len(commits)}" / "published"
                work.mkdir(parents=True)
                run_published(args.python, directory, work, cases, files)
                found += run_ours(folder, cases, work, files)
                versions = packages(work)
            commits.append(published_commit(directory))
    if not found:
        raise SystemExit(f"--models={args.models}: no model has this in its name")
    figures = {
        "published_commits": commits,
        "packages": versions,
        "tolerance": TOLERANCE,
        "cases": [dataclasses.asdict(one) | {"agrees": one.agrees} for one in found],
    }
    report_writer.write(args.out, figures, _page(found, commits, versions))
    if not all(one.agrees for one in found):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
