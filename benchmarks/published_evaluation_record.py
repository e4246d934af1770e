"""What the published code recorded, what ours computed, and its noise in our protocol."""

import contextlib
import dataclasses
import pathlib
from unittest import mock

import jax.numpy as jnp
import numpy as np

from esolm_jax.evaluation import published_bound, window_noise
from esolm_jax.evaluation.protocol import published_nelbo


@dataclasses.dataclass(frozen=True)
class Record:
    """What the published code did in one case.

    Attributes:
      batches: of each, x and valid [B, L], its noise, the nll of its tokens in text order, and
        loss, nll and tokens as that code sums them.
      final: nll and ppl.
    """

    batches: list[dict]
    final: dict[str, float]

    @classmethod
    def read(cls, path: pathlib.Path) -> "Record":
        with np.load(path) as file:
            saved = dict(file)
        batches: list[dict] = [{} for _ in range(int(saved.pop("batches")))]
        final = {}
        for name, value in saved.items():
            index, _, key = name.partition(".")
            if index == "final":
                final[key] = float(value)
            elif index.isdigit():
                batches[int(index)][key] = value
        return cls(batches, final)

    @property
    def windows(self) -> np.ndarray:
        """All windows, int [N, L], in the order in which they were read."""
        return np.concatenate([batch["x"] for batch in self.batches])

    @property
    def valid(self) -> np.ndarray:
        """Their attention masks, bool [N, L]."""
        return np.concatenate([batch["valid"] for batch in self.batches]) == 1

    def window_nll(self) -> list[np.ndarray]:
        """Nats of each window of each batch, of the term that it feeds."""
        return [np.concatenate(_row_sums(batch)) for batch in self.batches]


def _row_sums(batch: dict) -> list[np.ndarray]:
    """Of the diffusion rows and of the sequential rows, those that there are."""
    found, start = [], 0
    for name in ("diffusion_nll", "sequential_nll"):
        if name in batch:
            nll = np.asarray(batch[name], np.float64)
            valid = batch["valid"][start : start + len(nll), -nll.shape[1] :]
            found.append((nll * valid).sum(axis=1))
            start += len(nll)
    return found


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What our code did in one case.

    Attributes:
      windows, valid: int and bool [N, L]. window_nll: nats of each window, by batch.
      sums: of each batch. nll: of the whole, in nats per token.
    """

    windows: np.ndarray
    valid: np.ndarray
    window_nll: list[np.ndarray]
    sums: list[published_nelbo.BatchNelbo]
    nll: float


# The recorded noise.


def _noise_table(records: list[Record], mask: int) -> dict[str, np.ndarray]:
    """Of all windows: x, and the noise of each phase [N, …]; a window that did not feed a phase is
    all masked, in text order, at time 1. ValueError: two windows are equal."""
    rows: dict[str, list[np.ndarray]] = {}
    for batch in (batch for record in records for batch in record.batches):
        x = batch["x"]
        first = len(batch.get("t", ()))
        in_order = np.broadcast_to(np.arange(x.shape[1]), x.shape)
        for phase, noisy in (("diffusion", "xt"), ("sequential", "z0")):
            own = slice(0, first) if phase == "diffusion" else slice(first, None)
            masked, order = np.ones(x.shape, bool), in_order.copy()
            if noisy in batch:
                masked[own] = batch[noisy] == mask
                order[own] = batch.get(f"{phase}_order", order[own])
            rows.setdefault(f"{phase}_masked", []).append(masked)
            rows.setdefault(f"{phase}_order", []).append(order)
        times = batch.get("t", np.ones(0, np.float32))
        t = np.ones((len(x), *times.shape[1:]), np.float32)
        t[:first] = times
        rows.setdefault("t", []).append(t)
        rows.setdefault("x", []).append(x)
    table = {name: np.concatenate(parts) for name, parts in rows.items()}
    if len(np.unique(table["x"], axis=0)) < len(table["x"]):
        raise ValueError("the texts make two equal windows, whose noise cannot be told apart")
    return table


@contextlib.contextmanager
def recorded_noise(records: list[Record], mask: int):
    """Within it, the protocol labels windows with the noise of the published code."""
    table = {name: jnp.asarray(a) for name, a in _noise_table(records, mask).items()}

    def labelled_phases(config, built, key, offset_B, window_B, x, valid):
        del key, offset_B, window_B, valid
        row_B = (x[:, None] == table["x"][None]).all(axis=-1).argmax(axis=1)
        mine = {name: array[row_B] for name, array in table.items()}
        phases = ["diffusion"] * (config.alpha_0 > 0) + ["sequential"] * (config.alpha_0 < 1)
        labelled = []
        for phase in phases:
            t_B = mine["t"] if phase == "diffusion" else None
            noise = published_nelbo.Noise(mine[f"{phase}_masked"], mine[f"{phase}_order"], t_B)
            settings = {"alpha_0": config.alpha_0, "mask": built.special.mask}
            labelled.append(published_nelbo.label(config.objective, x, noise, **settings))
        return labelled

    label_bd3 = published_nelbo.label_bd3

    def labelled_bd3(x, masked, t_BL, **settings):
        del masked, t_BL
        row_B = (x[:, None] == table["x"][None]).all(axis=-1).argmax(axis=1)
        return label_bd3(x, table["diffusion_masked"][row_B], table["t"][row_B], **settings)

    with (
        mock.patch.object(window_noise, "labelled_phases", labelled_phases),
        mock.patch.object(published_nelbo, "label_bd3", labelled_bd3),
    ):
        yield


@contextlib.contextmanager
def collecting():
    """Collects (nats of the rows that are summed, sums) of each batch."""
    found: list = []
    sums = published_bound.batch_sums

    def collect(nll_PB, count_B, first):
        made = sums(nll_PB, count_B, first)
        rows = int((count_B > 0).sum())
        found.append((np.concatenate([nll_PB[0][:first], nll_PB[-1][first:rows]]), made))
        return made

    with mock.patch.object(published_bound, "batch_sums", collect):
        yield found
