"""A family and a schedule that only this file knows go the whole way through the verbs."""

import functools
import json
import pathlib
import subprocess

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from tiny_run import FILE, LENGTH, arguments, command

from esolm_jax.family import eso_b, registry
from esolm_jax.family.family import Family
from esolm_jax.family.phase import Phase
from esolm_jax.sampling.plan import schedule

pytestmark = pytest.mark.fast_compile
ROOT = pathlib.Path(__file__).parents[2]
NAME = "from_right"


def label(special, key, x, valid):
    """Every token is predicted from those to its right."""
    del key
    position = jnp.arange(x.shape[1])
    order_BL = jnp.argsort(jnp.where(valid, -position, position), axis=1, stable=True)
    return eso_b.label_sequential(x, valid, valid, order_BL, valid, mask=special.mask)


def phases(s):
    return (Phase("only", 1.0, functools.partial(label, s.special), can_trim_queries=True),)


def from_the_right(canvas, settings):
    del settings

    def row(b, unknown):
        order = unknown[::-1].astype(np.int32)
        return order, np.ones(len(order), np.int32), np.zeros(len(order), bool)

    return schedule.schedule_from_rows(canvas, row)


@pytest.fixture(scope="module", autouse=True)
def registered():
    family = Family(
        name=NAME,
        phases=phases,
        windows=eso_b.windows,
        work=eso_b.work,
        fixed_alpha_0=0.0,
        schedules=("ancestral", NAME),
        replaced_schedules={"ancestral": NAME},
        no_parallel="one token per step",
        no_speculation="a fixed order",
    )
    registry.register(family)
    schedule.register(from_the_right, NAME)
    yield
    registry.unregister(NAME)
    schedule.unregister(NAME)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, registered):
    folder = tmp_path_factory.mktemp("toy")
    fields = tiny_run.write_data(folder, objective=NAME, alpha_0=0.0) | {"train.steps": 6}
    args = [f"--config={FILE}", f"--workdir={folder / 'run'}", *arguments(fields)]
    assert command("train", *args) == 0
    return folder / "run"


def test_it_is_evaluated(workdir, capsys):
    assert command("evaluate", f"--workdir={workdir}") == 0
    figures = json.loads((workdir / "evaluate.json").read_text())
    assert figures["objective"] == NAME
    (result,) = figures["results"]
    assert result["bound"] == "exact"
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in lines if "loss" in entry]
    assert losses[-1] < losses[0]


def test_it_is_sampled_from_right_to_left(workdir):
    assert command("sample", f"--workdir={workdir}", "--trace") == 0
    rows = [json.loads(line) for line in (workdir / "samples.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    for row in rows:
        assert row["order"] == list(range(LENGTH))[::-1]


def test_what_the_family_lacks_is_one_line(workdir, capsys):
    assert command("sample", f"--workdir={workdir}", "--config.sample.steps=4") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"config.sample.steps=4: must be 0, one token per step, with objective {NAME}" in line


def test_no_other_file_mentions_it():
    found = subprocess.run(
        ["git", "-C", str(ROOT), "grep", "-lw", NAME], capture_output=True, text=True
    )
    assert found.returncode in (0, 1), found.stderr
    assert [path for path in found.stdout.split() if "toy_family" not in path] == []
