"""A data source and a metric that only this file knows go the whole way through the verbs."""

import json
import pathlib
import subprocess

import numpy as np
import pytest
from tiny_run import FILE, arguments, command

from esolm_jax.data import sources
from esolm_jax.data.source import Source
from esolm_jax.evaluation import metrics
from esolm_jax.evaluation.metric import Metric, Result

pytestmark = pytest.mark.fast_compile
ROOT = pathlib.Path(__file__).parents[2]
SOURCE, METRIC = "multiplication_table", "share_of_vowels"
COUNTS = {"train": 90, "validation": 20, "test": 20}


def documents(config, split, spec):
    first = sum(COUNTS.values()) - COUNTS[split]
    yield from (f"{i} times {split} is {i * i}" for i in range(first, first + COUNTS[split]))


def make_share(config, model, draws):
    def share(params, batches, *, split, seed, progress=None, total=None):
        tokens = [np.asarray(b["x"])[np.asarray(b["valid"])] for b in batches]
        value = float(np.isin(np.concatenate(tokens), list(b"aeiou")).mean())
        return Result(value, {"share": value}, f"vowels: {value:.3f}")

    return share


@pytest.fixture(scope="module", autouse=True)
def registered():
    sources.register(Source(SOURCE, documents, identity=lambda config: b"1"))
    metrics.register(Metric(METRIC, make_share))
    yield
    sources.unregister(SOURCE)
    metrics.unregister(METRIC)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, registered):
    folder = tmp_path_factory.mktemp("toy")
    fields = {"data.source": SOURCE, "train.metrics": f"nelbo,{METRIC}", "objective": "mdlm"}
    args = [f"--config={FILE}", f"--workdir={folder}", *arguments(fields)]
    for verb in ("prepare", "train"):
        assert command(verb, *args) == 0
    return folder


def test_the_metric_is_a_training_curve(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    values = [entry[f"validation_{METRIC}"] for entry in lines if f"validation_{METRIC}" in entry]
    assert len(values) == 2 and 0 < values[0] < 1
    assert (workdir / "learning_curve.png").exists()


def test_the_metric_is_evaluated(workdir, capsys):
    names = f"--config.eval.metrics={METRIC},nelbo"
    assert command("evaluate", f"--workdir={workdir}", names) == 0
    vowels, bound = json.loads((workdir / "evaluate.json").read_text())["results"]
    assert 0 < vowels["share"] < 1 and bound["bound"] == "nelbo"
    assert f"vowels: {vowels['share']:.3f}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "given, told",
    [
        ("eval.metrics=share_of_vowel", f"of nelbo, importance_weighted, sampler, {METRIC}"),
        (f"train.metrics={METRIC}", "nelbo among them"),
        ("data.source=multiplication", f"{SOURCE} (did you mean '{SOURCE}'?)"),
    ],
)
def test_a_wrong_name_is_one_line(workdir, given, told, capsys):
    assert command("evaluate", f"--workdir={workdir}", f"--config.{given}") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line


def test_no_other_file_mentions_them():
    names = ["-e", SOURCE, "-e", METRIC]
    found = subprocess.run(
        ["git", "-C", str(ROOT), "grep", "-lw", *names], capture_output=True, text=True
    )
    assert found.returncode in (0, 1), found.stderr
    assert [path for path in found.stdout.split() if "toy_source" not in path] == []
