"""The figures of the steps between two logs, with a clock and devices that are made up."""

import types

import pytest

from esolm_jax.training import speed

COST = speed.StepCost(tokens=1000, devices=4, flops=8e9, peak_flops=1e9)
UNKNOWN = speed.StepCost(tokens=1000, devices=4, flops=8e9, peak_flops=None)


@pytest.fixture
def now(monkeypatch):
    """A clock that a test moves."""
    now = types.SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(speed.time, "perf_counter", lambda: now.seconds)
    return now


def device(stats):
    return types.SimpleNamespace(memory_stats=lambda: stats)


def test_figures_of_some_steps(now):
    devices = [device({"peak_bytes_in_use": 3}), device({"peak_bytes_in_use": 7}), device(None)]
    clock = speed.StepClock(10, COST, devices)
    with clock.waiting_for_data():
        now.seconds += 1
    now.seconds += 19
    assert clock.read(15) == {
        "step_ms": 4000.0,
        "data_wait_ms": 200.0,
        "tokens_per_second": 250.0,
        "tokens_per_second_per_device": 62.5,
        "mfu": 0.5,  # 2e9 FLOPs a device in 4 s, of 1e9 FLOP/s
        "peak_memory_bytes": 7,
    }
    assert clock.step_seconds == 4
    now.seconds += 1
    figures = clock.read(16)  # neither the earlier time nor the earlier wait
    assert figures["step_ms"] == 1000 and figures["data_wait_ms"] == 0


@pytest.mark.parametrize("stats", [None, {}, {"bytes_in_use": 5}])
def test_unknown_figures_are_missing(now, stats):
    clock = speed.StepClock(0, UNKNOWN, [device(stats)])
    now.seconds += 1
    assert not {"mfu", "peak_memory_bytes"} & clock.read(1).keys()


def test_time_that_belongs_to_no_step(now):
    clock = speed.StepClock(0, COST, [])
    with clock.waiting_for_data():
        now.seconds += 50
    clock.restart(3)  # after a validation
    now.seconds += 2
    with clock.stopped():
        now.seconds += 30
    assert clock.read(4)["step_ms"] == 2000


def test_text_of_the_progress_bar():
    figures = {"step_ms": 1234.56, "data_wait_ms": 0.04, "tokens_per_second_per_device": 41234.4}
    text = "1,234.6 ms/step (data 0.0), 41,234 tokens/s/device"
    assert speed.bar_text(figures) == text
    figures |= {"mfu": 0.4123, "peak_memory_bytes": 61.24 * 2**30}
    assert speed.bar_text(figures) == f"{text}, MFU 41.2%, 61.2 GiB"
