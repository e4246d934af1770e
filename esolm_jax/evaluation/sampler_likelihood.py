"""Likelihood of the sampler that config.sample describes: the probability that it draws a text.

For one draw of the schedule (the order σ and the sizes of its steps) it is exact, for every family,
loop and number of steps, at any temperature, top-k and top-p:

    log p_σ(x) = Σ over passes, over the tokens of a pass: log p(token | what the pass reads)

- One token per pass, in an order that is known in advance: one forward pass over the whole text
  (ar, eso_b at temperature 1 without filters).
- Otherwise a teacher-forced run of the sampler's own loop, with its cache. In confidence order the
  text itself decides the order; rounding breaks ties, such as that of all positions of eso_b with
  RoPE before the first token.

The likelihood is log p_σ(x) if the sampler has a single order ("exact"): confidence order; the
schedules `strided` and `left_to_right`; any schedule at α₀ = 0; ar. Other schedules draw orders and
steps from their seed, and the likelihood log E_σ p_σ(x) has no closed form. log mean_k p_σk(x) of K
draws bounds it from below in expectation ("importance_weighted").

There is none if texts may end early (sample.stop_at_eos). The NELBO is a bound for another
sampler: see likelihood.py.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from esolm_jax import config as config_lib
from esolm_jax.errors import UserError
from esolm_jax.evaluation import likelihood
from esolm_jax.evaluation.likelihood import Estimate
from esolm_jax.family import registry
from esolm_jax.model.build import BuiltModel
from esolm_jax.parallel import multihost, sharding
from esolm_jax.sampling import generate, published_loops
from esolm_jax.sampling.engine import network as network_lib
from esolm_jax.sampling.engine.network import Network
from esolm_jax.sampling.generate import Generator
from esolm_jax.sampling.plan import schedule as schedule_lib
from esolm_jax.sampling.plan.canvas import MASK, Canvas, Seed


def has_one_order(config: ConfigDict) -> bool:
    """Whether the sampler's order and steps are the same for every seed, given the text."""
    if generate.loop_name(config) == "confidence":
        return True
    s, family = config.sample, registry.get(config.objective)
    name = family.replaced_schedules.get(s.schedule, s.schedule)
    return not schedule_lib.is_random(name, config.alpha_0)


def check(config: ConfigDict, num_orders: int) -> None:
    """UserError unless the likelihood exists, or its bound of `num_orders` orders."""
    generate.check(config)
    loop = generate.loop_name(config)
    if loop in published_loops.NAMES:
        raise UserError(
            f"config.sample.loop={loop!r}: must be plain, speculative or confidence, because the "
            "log-probabilities of this loop's draws are not computed"
        )
    if config.sample.stop_at_eos:
        raise UserError(
            "config.sample.stop_at_eos=True: must be False, because the likelihood is of all "
            "tokens of a text"
        )
    if not num_orders and not has_one_order(config):
        raise UserError(
            f"num_orders=0: must be positive: sample.schedule={config.sample.schedule!r} at "
            f"alpha_0={config.alpha_0:g} draws its order, so the likelihood is a mean over orders, "
            "which K orders bound"
        )


@dataclasses.dataclass(frozen=True)
class SamplerLikelihood:
    """Likelihoods under the sampler of config.sample.

    Attributes:
      network: folded weights of `params`, on the mesh of `built`.
    """

    config: ConfigDict
    built: BuiltModel
    params: dict
    network: Network

    @classmethod
    def of(cls, config: ConfigDict, built: BuiltModel, params: dict) -> "SamplerLikelihood":
        """Folds the weights. UserError: the mesh splits the tokens of a text."""
        if built.mesh.shape["sequence"] > 1:
            raise UserError(
                f"config.mesh.sequence={built.mesh.shape['sequence']}: must be 1 for the sampler's "
                "likelihood"
            )
        dtype = config.sample.weight_dtype
        network = network_lib.fold(built.model, params, built.mesh, dtype=dtype)
        return cls(config, built, params, network)

    def log_p(self, rows: Sequence[Sequence[int]], seeds: Sequence[Seed]) -> np.ndarray:
        """float64 [n]: log p_σ of each row of token ids, under the draw σ of its seed.

        The sampler is asked for texts of exactly these numbers of tokens.

        Raises:
          UserError: as check(); a text is empty or too long, or has an id out of range.
        """
        rows = [[*map(int, row)] for row in rows]
        config = self._with_length(rows)
        shards = sharding.num_row_shards(self.built.mesh)
        more = -len(rows) % shards  # the first text once more
        padded, seeds = rows + rows[:1] * more, [*seeds, *[seeds[0]] * more]
        canvas, text = self._canvas(padded, seeds)
        generator = Generator.of(config, canvas, self.built.special, mesh=self.built.mesh)
        if self._is_one_pass(config, generator):
            found = self._one_pass(generator, text)
        else:
            found = generator.log_p(self.network, text).sum(axis=1, dtype=np.float64)
        return found[: len(rows)]

    def _with_length(self, rows: list[list[int]]) -> ConfigDict:
        """The config of a sampler of the longest text. UserError: an empty or too long text."""
        lengths = [len(row) for row in rows]
        if not min(lengths, default=0):
            raise UserError("texts: must have at least one text, and each at least one token")
        config = config_lib.overridden(self.config, {"sample.length": max(lengths)})
        check(config, num_orders=1)
        return config

    def _canvas(self, rows: list[list[int]], seeds: Sequence[Seed]) -> tuple[Canvas, np.ndarray]:
        """(canvas without known tokens, text int32 [n, L])."""
        sizes = {"vocab_size": self.built.model.vocab_size, "mask_id": self.built.special.mask}
        text = Canvas.of(rows, seeds, **sizes).token
        unknown = [[MASK] * len(row) for row in rows]
        return Canvas.of(unknown, seeds, **sizes), text

    def _is_one_pass(self, config: ConfigDict, generator: Generator) -> bool:
        s, can = config.sample, registry.get(config.objective).label_in_order is not None
        is_unfiltered = s.temperature == 1 and s.top_p == 1 and not s.top_k
        is_unquantized = s.weight_dtype == s.cache_dtype == "auto"
        one_a_pass = int(generator.schedule.sizes.max(initial=0)) <= 1
        is_one = can and is_unfiltered and is_unquantized and one_a_pass
        return is_one and not generator.loop.decides_order

    def _one_pass(self, generator: Generator, text: np.ndarray) -> np.ndarray:
        drawn = generator.schedule
        valid = np.arange(text.shape[1])[None] < drawn.length[:, None]
        rows = sharding.rows(self.built.mesh)
        arrays = sharding.put((text, valid, drawn.order.astype(np.int32)), rows)
        program = _one_pass_program(self.config.objective, self.built)
        return -np.asarray(program(self.params, *arrays), np.float64)

    def estimate(
        self, batches: Iterable[Sequence[Sequence[int]]], *, num_orders: int, seed: int
    ) -> Estimate:
        """The negative log-likelihood of all rows of the batches, or its bound of `num_orders`
        orders. The orders of row n depend on the seed and n alone.

        Raises:
          UserError: as log_p(); or num_orders is 0 and the sampler has more than one order.
        """
        check(self.config, num_orders)
        exact, first = has_one_order(self.config), 0
        draws = 1 if exact else num_orders
        values, variances, lengths = [], [], []
        for rows in batches:
            log_p = []
            for k in range(draws):
                seeds = [Seed((seed + k) % 2**32, first + n) for n in range(len(rows))]
                log_p.append(self.log_p(rows, seeds))
            value, variance = likelihood.log_mean_exp(np.array(log_p).T)
            values.append(value)
            variances.append(0 * value if exact else variance)
            lengths += map(len, rows)
            first += len(rows)
        if not values:
            raise UserError("texts: must have at least one text")
        tokens, nll = np.array(lengths, np.int64), -np.concatenate(values)
        return Estimate(
            nll=float(nll.sum()) / int(tokens.sum()),
            standard_error=math.sqrt(float(np.concatenate(variances).sum())) / int(tokens.sum()),
            num_tokens=int(tokens.sum()),
            error_samples=len(tokens) * (draws - 1),
            window_nll=nll,
            window_tokens=tokens,
        )


@functools.lru_cache(maxsize=8)
def _one_pass_program(objective: str, built: BuiltModel) -> Callable:
    """(params, text, valid, order [B, L] each) → −log p_σ(x) of each row, float32 [B]."""
    label = registry.get(objective).label_in_order
    assert label is not None

    def nll(params: dict, text: Any, valid: Any, order: Any) -> jax.Array:
        labelled = label(text, valid, valid, order, built.special)
        return likelihood.labelled_nll(built.apply, built.head, params, labelled)

    return multihost.together(jax.jit(nll, out_shardings=sharding.replicated(built.mesh)))
