"""config.train.profile_steps: an XLA profile of these steps, and of no others."""

import pytest
import tiny_run
from tiny_run import make_config

from esolm_jax.config.checks import step_range
from esolm_jax.training import profiling, speed

pytestmark = pytest.mark.fast_compile
COST = speed.StepCost(tokens=1, devices=1, flops=1.0, peak_flops=None)


class Traces:
    """Records calls of jax.profiler in place of tracing."""

    def __init__(self, monkeypatch):
        self.calls = []
        for name in ("start_trace", "stop_trace"):
            monkeypatch.setattr(
                profiling.jax.profiler, name, lambda *args, name=name: self.calls.append(name)
            )


@pytest.fixture
def traces(monkeypatch):
    return Traces(monkeypatch)


def run(traces, folder, steps, first, last, *, enabled=True):
    """The calls of the profiler with the steps around them, and the lines announced."""
    lines = []
    clock = speed.StepClock(0, COST, [])
    profile = profiling.Profile(steps, folder, enabled=enabled, clock=clock, announce=lines.append)
    for step in range(first, last + 1):
        profile.before(step, ())
        traces.calls.append(step)
        profile.after(step, ())
    profile.close()
    return traces.calls, lines


def test_steps_to_trace():
    assert [*step_range("100:105")] == [100, 101, 102, 103, 104]


def test_these_steps_and_no_others(traces, tmp_path):
    calls, (line,) = run(traces, tmp_path, "3:5", 1, 7)
    assert calls == [1, 2, "start_trace", 3, 4, "stop_trace", 5, 6, 7]
    folder = tmp_path / "profile"
    assert line.startswith(f"wrote a profile of steps 3 to 4 to {folder}; next: tensorboard ")
    assert f"--logdir={folder}" in line


@pytest.mark.parametrize(
    ("first", "last", "traced"), [(1, 3, "3 to 3"), (4, 7, "4 to 4"), (3, 3, "3 to 3")]
)
def test_run_that_begins_or_ends_within_the_range(traces, tmp_path, first, last, traced):
    calls, (line,) = run(traces, tmp_path, "3:5", first, last)
    assert calls.count("start_trace") == calls.count("stop_trace") == 1
    assert f"steps {traced} to" in line


@pytest.mark.parametrize(
    ("steps", "first", "enabled"), [("3:5", 5, True), ("", 1, True), ("3:5", 1, False)]
)
def test_nothing_is_traced(traces, tmp_path, steps, first, enabled):
    """Past the range, without one, and in a process that is not the first."""
    assert run(traces, tmp_path, steps, first, 7, enabled=enabled) == ([*range(first, 8)], [])


def test_profile_of_a_run(tmp_path, capsys):
    data = tiny_run.write_data(tmp_path / "data")
    fields = {"objective": "ar", "train.eval_every": 100, "train.profile_steps": "2:4"}
    tiny_run.train(make_config(data | fields), tmp_path / "run")
    printed = capsys.readouterr()
    folder = tmp_path / "run" / "profile"
    assert f"steps 2 to 3 to {folder}; next: tensorboard" in printed.out + printed.err
    (written,) = folder.rglob("*.xplane.pb")
    assert written.stat().st_size > 0
    tiny_run.train(make_config(data | fields | {"train.steps": 5}), tmp_path / "run")  # past it
    assert [*folder.rglob("*.xplane.pb")] == [written]
