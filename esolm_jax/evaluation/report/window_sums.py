"""One pass over the windows of a data set: the bound by position, and the predicted distributions.

The noise is that of `window_noise`: it belongs to the windows, so that batch size and mesh change
sums by rounding only. A term of the bound, weight · (−log p), belongs to the position of the
predicted token, so the sums over positions add up to the bound.

Sums are kept for blocks of consecutive windows (at most BLOCKS), from which statistics.py computes
errors.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from esolm_jax.evaluation.likelihood import (
    Estimate,
    bound_phases,
    counted_batches,
    on_kept_queries,
)
from esolm_jax.evaluation.window_noise import (
    compiled,
    labelled_phases,
    nelbo_estimate,
    noise_of,
)
from esolm_jax.family import noise, registry
from esolm_jax.family.labels import LabelledBatch
from esolm_jax.family.phase import Phase, is_exact
from esolm_jax.model.build import BuiltModel
from esolm_jax.model.lm_head import TokenStatistics, token_statistics
from esolm_jax.process import prng

BLOCKS = 100  # of consecutive windows
POSITION_BINS = 16  # of equal width, or one for each position of a shorter window
CONFIDENCE_BINS = 15  # of equal width, as in Guo et al. (arXiv 1706.04599)
NOISE_BINS = 4  # of α_t, of equal width in [0, α₀]
CELL = ("count", "confidence", "is_top", "entropy", "nll")  # sums over predictions


@dataclasses.dataclass(frozen=True)
class WindowSums:
    """Sums over the windows of one data set.

    Attributes:
      estimate: the bound (or the exact likelihood), as window_noise.make_nelbo estimates it.
      draws: draws of noise of each window.
      position_edges: int [bins + 1]; bin i holds the positions [edges[i], edges[i + 1]).
      positions: float64 [blocks, bins, 2]: nats, as the mean over draws, and real tokens.
      groups: names of the noise levels and phases.
      cells: float64 [blocks, groups, CONFIDENCE_BINS, 5]: the sums of CELL over predicted tokens of
        all draws, by the bin of their confidence.
    """

    estimate: Estimate
    draws: int
    position_edges: np.ndarray
    positions: np.ndarray
    groups: tuple[str, ...]
    cells: np.ndarray


def is_diffusion(phase: Phase) -> bool:
    """Whether the weights of a phase are those of noise levels."""
    return phase.name == "diffusion"


def num_groups(phase: Phase) -> int:
    """The noise levels of a diffusion phase; another phase is one group."""
    return NOISE_BINS if is_diffusion(phase) else 1


def group_names(config, phases: Iterable[Phase]) -> tuple[str, ...]:
    """The names of all groups."""
    names: list[str] = []
    for phase in phases:
        if not is_diffusion(phase):
            names.append(phase.name)
            continue
        edges = [config.alpha_0 * i / NOISE_BINS for i in range(NOISE_BINS + 1)]
        pairs = zip(edges, edges[1:], strict=False)
        names += [f"diffusion, α_t {low:.4g} to {high:.4g}" for low, high in pairs]
    return tuple(names)


def position_bins(length: int) -> tuple[np.ndarray, np.ndarray]:
    """(bin of each position, int32 [L]; edges, int [bins + 1])."""
    bins = min(POSITION_BINS, length)
    bin_of = np.arange(length) * bins // length
    return bin_of.astype(np.int32), np.searchsorted(bin_of, np.arange(bins + 1))


def _sums_of(classes, count: int, values):
    """Σ of each row's values by class: classes int32 [B, P], values float32 [B, P, …] →
    [B, count, …]. Classes out of range are left out."""
    hot = jax.nn.one_hot(classes, count, dtype=values.dtype)
    return jnp.einsum("bpk,bp...->bk...", hot, values, precision="highest")


def _noise_bin(labelled: LabelledBatch, alpha_0: float):
    """The bin of α_t of each predicted token of a diffusion phase: int32 [B, P]."""
    weight = jnp.where(labelled.weight == 0, 1, labelled.weight)
    share = noise.alpha_of_weight(weight, alpha_0) / alpha_0
    return jnp.clip((share * NOISE_BINS).astype(jnp.int32), 0, NOISE_BINS - 1)


def cells_of(labelled: LabelledBatch, statistics: TokenStatistics, group, count: int):
    """The sums of CELL of each row: float32 [B, count, CONFIDENCE_BINS, 5].

    Args:
      group: int32 [B, P], the group of each predicted token, less than `count`.
    """
    is_predicted = (labelled.weight != 0).astype(jnp.float32)
    level = (statistics.confidence * CONFIDENCE_BINS).astype(jnp.int32)
    classes = group * CONFIDENCE_BINS + jnp.clip(level, 0, CONFIDENCE_BINS - 1)
    values = [is_predicted, *(getattr(statistics, name) for name in CELL[1:])]
    values = [is_predicted * value for value in values]
    sums = _sums_of(classes, count * CONFIDENCE_BINS, jnp.stack(values, axis=-1))
    return sums.reshape(len(group), count, CONFIDENCE_BINS, len(CELL))


@dataclasses.dataclass(frozen=True, eq=False)  # hashed by identity, for jax.jit
class Draw:
    """One draw of noise.

    Attributes:
      names: of the groups. bin_of: the bin of each position, int32 [L]. bins: their number.
    """

    config: Any
    built: BuiltModel
    names: tuple[str, ...]
    bin_of: np.ndarray
    bins: int

    @classmethod
    def of(cls, config, built: BuiltModel) -> "Draw":
        names = group_names(config, bound_phases(config, built.special))
        bin_of, edges = position_bins(config.data.seq_len)
        return cls(config, built, names, bin_of, len(edges) - 1)

    def run(self, params, key, first, x, valid):
        """(nats [B, bins], real tokens [B, bins], cells [B, groups, CONFIDENCE_BINS, 5]), float32,
        of the windows `first` and following."""
        rows = x.shape[0]
        place = jnp.broadcast_to(jnp.asarray(self.bin_of)[None], x.shape)
        tokens = _sums_of(place, self.bins, valid.astype(jnp.float32))
        drawn = noise_of(key, first, rows)
        batches = labelled_phases(self.config, self.built, *drawn, x, valid)
        phases = bound_phases(self.config, self.built.special)
        found, group = [], 0
        for phase, labelled in zip(phases, batches, strict=True):
            run = functools.partial(self.phase_sums, params, is_diffusion(phase), group)
            found.append(on_kept_queries(run, phase, labelled, self.built.mesh))
            group += num_groups(phase)
        nats, cells = (sum(each[1:], each[0]) for each in zip(*found, strict=True))
        return nats, tokens, cells

    def phase_sums(self, params, has_levels: bool, group: int, labelled: LabelledBatch):
        """The nats and cells of a phase. `group`: its first one."""
        found = self._statistics(params, labelled)
        shift = registry.get(self.config.objective).predicts_next
        position = labelled.tokens.position[:, : labelled.target.shape[1]] + shift
        at_bin = jnp.asarray(self.bin_of).at[position].get(mode="fill", fill_value=self.bins)
        nats = _sums_of(at_bin, self.bins, labelled.weight * found.nll)
        groups = jnp.full(position.shape, group)
        if has_levels:
            groups += _noise_bin(labelled, self.config.alpha_0)
        return nats, cells_of(labelled, found, groups, len(self.names))

    def _statistics(self, params, labelled: LabelledBatch) -> TokenStatistics:
        predicted = (0, labelled.target.shape[1])
        hidden = self.built.apply(params, labelled.tokens, predict=predicted, head=False)
        target, weight = (labelled.target,), (labelled.weight,)
        return token_statistics(self.built.head, (hidden,), params["logits"], target, weight)[0]


def make(config, built: BuiltModel) -> Callable[..., WindowSums]:
    """Returns collect(params, batches, *, windows, num_samples, seed, progress, total) →
    WindowSums, where `batches` hold `windows` windows, as those of window_noise.make_nelbo."""
    exact, draw = is_exact(config), Draw.of(config, built)
    _, edges = position_bins(config.data.seq_len)
    run = compiled(draw.run, built)

    def collect(
        params, batches, *, windows: int, num_samples: int, seed: int, progress=None, total=None
    ) -> WindowSums:
        draws, blocks = 1 if exact else num_samples, min(windows, BLOCKS)
        keys = jax.random.split(prng.key(seed), draws)
        positions = np.zeros((blocks, len(edges) - 1, 2))
        cells = np.zeros((blocks, len(draw.names), CONFIDENCE_BINS, len(CELL)))
        values, counts, first = [], [], 0
        for _, count, batch in counted_batches(batches, built.mesh, progress, total):
            rows = np.int32(first), batch["x"], batch["valid"]
            drawn = [jax.tree.map(np.asarray, run(params, key, *rows)) for key in keys]
            nats, tokens, levels = (np.array(each, np.float64) for each in zip(*drawn, strict=True))
            is_real = count > 0
            block = (first + np.arange(len(count)))[is_real] * blocks // windows
            both = np.stack([nats.mean(axis=0), tokens[0]], axis=-1)
            np.add.at(positions, block, both[is_real])
            np.add.at(cells, block, levels.sum(axis=0)[is_real])
            values.append(nats.sum(axis=2))
            counts.append(count)
            first += len(count)
        estimate = nelbo_estimate(np.concatenate(values, axis=1), np.concatenate(counts), exact)
        return WindowSums(estimate, draws, edges, positions, draw.names, cells)

    return collect
