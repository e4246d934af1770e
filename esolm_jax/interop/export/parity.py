"""Measures the error of an exported function against the trained model.

Logits are compared with the training forward pass (adaLN included), greedy samples with `sample`.
"""

import dataclasses

import jax
import numpy as np

from esolm_jax.errors import UserError
from esolm_jax.family.labels import Tokens
from esolm_jax.family.phase import SpecialIds
from esolm_jax.interop import memory
from esolm_jax.interop.export import plain
from esolm_jax.interop.export.sampling_plan import Plan
from esolm_jax.interop.export.shipped import decode_loop
from esolm_jax.model import transformer as model_lib
from esolm_jax.model.model_config import ModelConfig
from esolm_jax.process import prng
from esolm_jax.sampling.engine.choose import TokenSampler
from esolm_jax.sampling.loops.loop import Task
from esolm_jax.sampling.loops.plain import Plain
from esolm_jax.sampling.plan import passes
from esolm_jax.sampling.plan.schedule import Schedule

TOLERANCE = 1e-4  # default, of a logit
BATCHES = (1, 5)
TOKENS = 64  # at most, of a text that score and step are checked on


def examples(model: ModelConfig, length: int) -> list[Tokens]:
    """A batch of each size. Ranks rise, with ties; query copies are in the second half, which
    the first half does not read, so that the first half can be in a cache."""
    rng, made = np.random.default_rng(0), []
    width = min(2 * length, TOKENS)
    half = width // 2
    for batch in BATCHES:
        rank = np.sort(rng.integers(0, half, (batch, width)), axis=1) // 2
        rank[:, half:] = half + rng.integers(0, 1 + half // 2, (batch, width - half))
        made.append(
            Tokens(
                token=rng.integers(0, model.vocab_size, (batch, width), np.int32),
                position=rng.integers(0, length, (batch, width), np.int32),
                rank=rank.astype(np.int32),
                in_context=(rng.random((batch, width)) < 0.5) | (np.arange(width)[None] < half),
            )
        )
    return made


def trained_logits(model: ModelConfig, params: dict, batches: list[Tokens]):
    """Logits of the training forward pass, float32, for each batch."""
    apply = jax.jit(model_lib.bind(plain.in_float32(model)))
    logits = [np.asarray(apply(params, tokens)) for tokens in batches]
    memory.clear_jit_caches_and_trim()
    return logits


def labels(tokens: Tokens, low: int = 0, high: int | None = None) -> tuple[np.ndarray, ...]:
    """Arguments of an exported function."""
    columns = (tokens.token, tokens.position, tokens.rank, tokens.in_context)
    return tuple(np.ascontiguousarray(column[:, low:high]) for column in columns)


def score_error(score, batches: list[Tokens], wanted) -> float:
    """The largest difference of a logit."""
    return max(
        _difference(score(*labels(tokens)), want)
        for tokens, want in zip(batches, wanted, strict=True)
    )


def step_error(step, cache: list[int], batches: list[Tokens], wanted) -> float:
    """The largest difference of a logit, with the first half of the tokens in the cache."""
    worst, (blocks, groups, head_width) = 0.0, cache
    for tokens, want in zip(batches, wanted, strict=True):
        (batch, width), half = tokens.token.shape, tokens.token.shape[1] // 2
        shape = blocks, batch, width + 3, groups, head_width
        keys = values = np.full(shape, 7, np.float32)  # unfilled slots must not be read
        for low, high in ((0, half), (half, width)):
            filled = np.full(batch, low, np.int32)
            logits, keys, values = step(*labels(tokens, low, high), keys, values, filled)
            worst = max(worst, _difference(logits, want[:, low:high]))
    return worst


def _difference(got, want) -> float:
    difference = np.abs(np.asarray(got) - want).max()
    return float(difference) if np.isfinite(difference) else float("inf")


class Texts:
    """Our own samples, from the folded network."""

    def __init__(self, config, plan: Plan, special: SpecialIds, network):
        self.config, self.plan, self.special, self.network = config, plan, special, network

    def of(self, order, num_diffusion, keys=None, *, sizes=None, temperature=0.0) -> np.ndarray:
        """int32 [B, L]; keys: uint32 [B, 2]; sizes: tokens per pass, by default 1."""
        order = np.asarray(order)
        sizes = np.ones(order.shape[1], int) if sizes is None else sizes
        drawn = Schedule(order, np.array(sizes), num_diffusion=np.asarray(num_diffusion))
        mask, start, s = self.special.mask, self.special.start, self.config.sample
        table = passes.plan(self.config, drawn, mask_id=mask, start_token=start)
        sampler = TokenSampler(mask_id=mask, temperature=temperature, top_p=s.top_p, top_k=s.top_k)
        keys = np.zeros((len(order), 2), np.uint32) if keys is None else keys
        loop = Plain(Task(table, sampler, prng.wrap(keys)))
        text = np.asarray(loop.run(self.network).text)
        memory.clear_jit_caches_and_trim()  # the program of these shapes runs once
        return text


@dataclasses.dataclass(frozen=True)
class Greedy:
    """Our greedy texts, one token a pass; `plan` is the `sampling` section for their length.

    Attributes:
      cases: (order, num_diffusion, text) for each batch size.
    """

    plan: dict
    cases: list[tuple[np.ndarray, np.ndarray, np.ndarray]]

    @classmethod
    def of(cls, texts: Texts) -> "Greedy":
        plan = texts.plan.about
        short = min(plan["length"], max(TOKENS - TOKENS % plan["order_block"], plan["order_block"]))
        if plan["order_block"] == plan["length"]:  # the text is one block
            short = min(plan["length"], TOKENS)
            same = {"order_block", "rank_block"} & {k for k in plan if plan[k] == plan["length"]}
            plan = plan | dict.fromkeys(same, short)
        plan = plan | {"length": short, "order": None, "passes": [[1, short]]}
        cases = []
        for batch in BATCHES:
            order, num_diffusion = decode_loop.draw_orders(plan, 0, batch)
            cases.append((order, num_diffusion, texts.of(order, num_diffusion)))
        return cls(plan, cases)

    def is_from(self, run) -> bool:
        """Whether decode_loop.py generates the same texts with a step, or with a score if passes
        run the whole text."""
        choose = decode_loop.chooser(self.plan)

        def text(order, num_diffusion):
            if self.plan["cached"]:
                return decode_loop.with_cache(run, self.plan, order, choose)
            return decode_loop.without_cache(run, self.plan, order, num_diffusion, choose)

        return all(np.array_equal(text(order, n), want) for order, n, want in self.cases)


def sampler_agrees(sample, texts: Texts) -> dict[str, bool]:
    """Whether its texts equal ours for the same seed: greedy, and at temperature 1."""
    temperatures = {"greedy_identical": 0.0, "sampled_identical": 1.0}
    agrees = dict.fromkeys(temperatures, True)
    for batch in BATCHES:
        rows = np.arange(batch, dtype=np.uint32)
        keys = jax.random.key_data(jax.vmap(jax.random.fold_in, (None, 0))(prng.key(0), rows))
        order, num_diffusion = decode_loop.draw_orders(texts.plan.about, 0, batch)
        sampled = {
            name: sample(keys, np.float32(t), order, num_diffusion)
            for name, t in temperatures.items()
        }
        memory.clear_jit_caches_and_trim()
        for name, text in sampled.items():
            temperature, sizes = temperatures[name], texts.plan.sizes
            ours = texts.of(order, num_diffusion, keys, sizes=sizes, temperature=temperature)
            agrees[name] &= np.array_equal(text, ours)
    return agrees


def require(file: str, measured: dict, tolerance: float) -> dict:
    """Returns `measured`. UserError unless logits agree to the tolerance and greedy texts match."""
    error = measured.get("max_logit_error", 0.0)
    if not error <= tolerance:
        raise UserError(
            f"{file}: the largest error of a logit is {error:.1e}; must be at most "
            f"{tolerance:g} (--tolerance); nothing was exported"
        )
    if not measured.get("greedy_identical", True):
        raise UserError(f"{file}: greedy texts differ from those of `sample`; nothing was exported")
    return measured
