"""A workdir written by commit 947f88e resumes, evaluates and samples to the same figures.

tests/fixtures/workdir_947f88e was made with that commit: `run` by prepare and train (4 steps of the
tiny config with sample.num, optimizer.clip, optimizer.ema and train.accumulation set).
evaluate.json, samples.jsonl and metrics.jsonl hold its figures; the last includes two more steps.
"""

import json
import pathlib
import shutil

import pytest
from tiny_run import command

from esolm_jax import config as config_lib
from esolm_jax.training import checkpoint_meta

FIXTURE = pathlib.Path(__file__).parents[1] / "fixtures" / "workdir_947f88e"


@pytest.fixture
def workdir(tmp_path):
    return shutil.copytree(FIXTURE / "run", tmp_path / "run")


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_its_config_has_todays_names(workdir, capsys):
    config = checkpoint_meta.saved_config(workdir)
    config_lib.validate(config)
    values = config_lib.flat(config)
    names = "sample.num_texts optimizer.clip_norm optimizer.ema_decay train.grad_accumulation"
    assert [values[name] for name in names.split()] == [3, 0.5, 0.9, 2]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{workdir}: saved with earlier names: config.")
    assert "config.sample.num is config.sample.num_texts now" in line


def test_it_evaluates_to_the_same_figures(workdir, capsys):
    assert command("evaluate", f"--workdir={workdir}") == 0
    told = capsys.readouterr().err
    assert told.count("saved with earlier names") == 1
    now, then = (json.loads((f / "evaluate.json").read_text()) for f in (workdir, FIXTURE))
    for name in ("windows", "num_tokens", "step", "trained_alpha_0"):
        assert now[name] == then[name]
    figures = [(r["nll_per_token"], r["standard_error"]) for r in then["results"]]
    for result, (nll, error) in zip(now["results"], figures, strict=True):
        assert result["nll_per_token"] == pytest.approx(nll, rel=1e-5)
        assert result["standard_error"] == pytest.approx(error, rel=1e-3)


def test_it_samples_the_same_texts(workdir):
    assert command("sample", f"--workdir={workdir}") == 0
    now, then = (lines_of(f / "samples.jsonl") for f in (workdir, FIXTURE))
    assert [sample["text"] for sample in now] == [sample["text"] for sample in then]


def test_it_resumes_to_the_same_losses(workdir):
    """An override with an earlier name, too."""
    args = ["--config.train.steps=6", "--config.train.accumulation=2"]
    assert command("train", f"--workdir={workdir}", *args) == 0
    now, then = lines_of(workdir / "metrics.jsonl"), lines_of(FIXTURE / "metrics.jsonl")
    assert len(now) == len(then)
    for new, old in zip(now, then, strict=True):
        for name in old.keys() & {"step", "loss", "validation_nelbo", "grad_norm"}:
            assert new[name] == pytest.approx(old[name], rel=1e-5), (old["step"], name)
    saved = json.loads((workdir / "config.json").read_text())
    assert saved["schema_version"] == 2 and saved["train"]["grad_accumulation"] == 2


@pytest.mark.parametrize("verb", ["evaluate", "sample", "train", "export"])
@pytest.mark.parametrize(
    ("section", "field", "value", "told"),
    [
        ("", "schema_version", 99, "its config has schema_version 99, but this esolm_jax reads"),
        ("", "qqq", 8, "config.qqq: unknown field; use the version of esolm_jax that wrote it"),
        ("train", "steps", None, "config.train.steps: missing, so it is not a config of esolm_jax"),
    ],
)
def test_workdir_of_other_code(workdir, capsys, verb, section, field, value, told):
    """One line that names the workdir and what to do, and nothing is written."""
    path = workdir / "checkpoints" / "4" / "meta" / "metadata"
    meta = json.loads(path.read_text())
    fields = meta["config"][section] if section else meta["config"]
    if value is None:
        del fields[field]
    else:
        fields[field] = value
    path.write_text(json.dumps(meta))
    before = sorted(workdir.rglob("*"))
    target = ["--to=out"] if verb == "export" else []
    assert command(verb, f"--workdir={workdir}", *target) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {workdir}: {told}")
    assert sorted(workdir.rglob("*")) == before
