"""The speed of training while it runs: times, rates and memory of the steps between two logs."""

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence

import jax

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class StepCost:
    """The constants of a run that turn the time of a step into rates.

    Attributes:
      tokens: tokens of a step, over all devices.
      devices: devices of the mesh.
      flops: lower bound of the FLOPs of a step, over all devices.
      peak_flops: bfloat16 FLOPs per second of one device; None if they are unknown.
    """

    tokens: int
    devices: int
    flops: float
    peak_flops: float | None


class StepClock:
    """Times steps without waiting for the device: `read` and `restart` must follow a wait.

    Steps are dispatched asynchronously. The trainer waits for the device when it logs, validates
    and saves, so the time between two such points is the time of the steps between them.
    """

    def __init__(self, step: int, cost: StepCost, devices: Sequence[jax.Device]):
        """`devices`: those of this process, whose memory is reported."""
        self._cost, self._devices = cost, devices
        self.step_seconds = 0.0  # of the steps before the last `read`
        self.restart(step)

    def restart(self, step: int) -> None:
        """Counts from now, after `step`. Earlier time belongs to no step: a validation, a save."""
        self._step, self._since, self._waited = step, time.perf_counter(), 0.0

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Around a wait for the reader."""
        begin = time.perf_counter()
        yield
        self._waited += time.perf_counter() - begin

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Around work on the host that belongs to no step, such as writing a profile."""
        begin = time.perf_counter()
        yield
        self._since += time.perf_counter() - begin

    def read(self, step: int) -> dict[str, float]:
        """The figures of the steps since the last `read` or `restart`, up to `step`; restarts.

        mfu and peak_memory_bytes are missing where they are unknown.
        """
        cost, steps, waited = self._cost, step - self._step, self._waited
        self.step_seconds = (time.perf_counter() - self._since) / steps
        self.restart(step)
        speed = cost.tokens / self.step_seconds
        figures = {
            "step_ms": round(1e3 * self.step_seconds, 3),
            "data_wait_ms": round(1e3 * waited / steps, 3),
            "tokens_per_second": round(speed, 1),
            "tokens_per_second_per_device": round(speed / cost.devices, 1),
        }
        if cost.peak_flops is not None:
            reached = cost.flops / cost.devices / self.step_seconds
            figures["mfu"] = round(reached / cost.peak_flops, 4)
        if (peak := peak_memory(self._devices)) is not None:
            figures["peak_memory_bytes"] = peak
        return figures


def peak_memory(devices: Sequence[jax.Device]) -> int | None:
    """Bytes in use at most since the start, of the fullest device; None if none reports them."""
    stats = [device.memory_stats() or {} for device in devices]
    peaks = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
    return max(peaks, default=None)


def bar_text(figures: dict[str, float]) -> str:
    """The figures for the progress bar."""
    text = (
        f"{figures['step_ms']:,.1f} ms/step (data {figures['data_wait_ms']:,.1f}), "
        f"{figures['tokens_per_second_per_device']:,.0f} tokens/s/device"
    )
    if "mfu" in figures:
        text += f", MFU {figures['mfu']:.1%}"
    if "peak_memory_bytes" in figures:
        text += f", {figures['peak_memory_bytes'] / GIB:.1f} GiB"
    return text
