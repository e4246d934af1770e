"""config.train.time_limit: a run ends in time, with a checkpoint, and goes on as if it had not."""

import types

import numpy as np
import pytest
import tiny_run
from processes import Processes
from tiny_run import FILE, arguments, command, make_config

from esolm_jax.training import metrics, time_limit

pytestmark = pytest.mark.fast_compile
LIMIT = 10.0  # minutes
FIELDS = {
    "objective": "ar", "model.dropout": 0.1, "train.steps": 12, "train.log_every": 2,
    "train.eval_every": 5, "train.checkpoint_every": 2,
}  # fmt: skip


def limit(**fields):
    train = {"steps": 100, "log_every": 10, "eval_every": 50, "checkpoint_every": 70}
    return time_limit.TimeLimit(types.SimpleNamespace(time_limit=LIMIT, **train | fields))


@pytest.mark.parametrize(
    ("step", "seconds"),
    [
        (10, 10 * 2 + 30),
        (40, 10 * 2 + 30 + 500),  # the validation after 50
        (50, 10 * 2 + 30),
        (60, 10 * 2 + 2 * 30),  # the checkpoint after 70 first
        (95, 5 * 2 + 30 + 500),  # the last validation
    ],
)
def test_seconds_needed(step, seconds, monkeypatch):
    now = iter([1000.0, 1500.0, 2000.0, 2001.0])
    monkeypatch.setattr(time_limit.time, "perf_counter", lambda: next(now))
    one = limit()
    for _ in range(2):  # the longer one counts
        with one.timing_validation():
            pass
    assert one.seconds_needed(step, step_seconds=2, checkpoint=30) == seconds


@pytest.mark.parametrize(("elapsed", "reached"), [(549, False), (551, True)])
def test_is_reached(elapsed, reached, monkeypatch):
    monkeypatch.setattr(time_limit, "seconds_since_start", lambda: elapsed)
    assert limit().is_reached(10, 2, 30) is reached  # 50 s to go, of 600


def test_checkpoint_that_was_not_timed_yet():
    state = {"a": np.zeros((1000, 1000), np.float32), "b": np.zeros(250_000, np.float32)}
    assert time_limit.checkpoint_seconds(None, state) == pytest.approx(0.05)
    assert time_limit.checkpoint_seconds(3.0, state) == 3


def test_seconds_since_start():
    first = time_limit.seconds_since_start()
    assert 0 < first <= time_limit.seconds_since_start()


def test_clock_of_process_0_counts_in_all():
    script = """
    import types
    from esolm_jax.training import time_limit
    def body(index):
        elapsed = [[0, 0, 1e6], [0, 1e6, 0]][index]  # process 1's clock is ahead at step 2
        train = types.SimpleNamespace(
            time_limit=10.0, steps=9, log_every=1, eval_every=9, checkpoint_every=9)
        limit = time_limit.TimeLimit(train)
        for step, seconds in enumerate(elapsed, start=1):
            time_limit.seconds_since_start = lambda: seconds
            if limit.is_reached(step, 0.1, 0.1):
                print("stopped after", step, flush=True)
                break
    main(body)
    """
    for code, out, err in Processes(script).wait():
        assert code == 0, err
        assert "stopped after 3" in out


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_run.write_data(tmp_path_factory.mktemp("data"))


def numbers(workdir):
    return [{k: v for k, v in e.items() if k != "timing"} for e in metrics.read(workdir)]


def test_limited_run_goes_on_to_the_same_numbers(data, tmp_path, monkeypatch, capsys):
    elapsed, timed = iter([0, 0, 60 * LIMIT]), []
    monkeypatch.setattr(time_limit, "seconds_since_start", lambda: next(elapsed))
    monkeypatch.setattr(time_limit, "checkpoint_seconds", lambda t, _: timed.append(t) or 0.0)
    args = [f"--workdir={tmp_path / 'limited'}", f"--config={FILE}", *arguments(data | FIELDS)]
    assert command("train", *args, f"--config.train.time_limit={LIMIT}") == 0
    printed = capsys.readouterr()
    assert (
        "stopped at step 6, because of config.train.time_limit=10.0 (minutes); run the same "
        "command again to continue"
    ) in printed.out + printed.err
    assert "next: " not in printed.out
    kept = {path.name for path in (tmp_path / "limited" / "checkpoints").iterdir()}
    assert kept - {"2"} == {"4", "6"}  # 2 may be the best
    assert timed[0] is None and timed[2] > 0  # the save at 2 has ended before the one at 4
    assert numbers(tmp_path / "limited")[-1]["step"] == 6

    assert command("train", *args) == 0  # no limit: the clock is not asked
    config = make_config(data | FIELDS)
    tiny_run.train(config, tmp_path / "whole")
    (found, found_meta), (wanted, wanted_meta) = (
        tiny_run.last_checkpoint(config, tmp_path / name) for name in ("limited", "whole")
    )
    assert int(found.step) == 12 and found_meta == wanted_meta
    for a, b in zip(tiny_run.jax.tree.leaves(found), tiny_run.jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(a, b)
    assert numbers(tmp_path / "limited") == numbers(tmp_path / "whole")
