"""Measures an exported function against the trained model.

Logits are compared with the training forward pass (adaLN included), texts with `sample`, and the
distributions of the next tokens, for rounded weights, with those of the float32 weights.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from esolm_jax.errors import UserError
from esolm_jax.family.labels import Tokens
from esolm_jax.family.phase import SpecialIds
from esolm_jax.interop import memory
from esolm_jax.interop.export import plain
from esolm_jax.interop.export.shipped import decode_loop, schedule_esolm
from esolm_jax.model import transformer as model_lib
from esolm_jax.model.model_config import ModelConfig
from esolm_jax.sampling import generate
from esolm_jax.sampling.engine.network import Network
from esolm_jax.sampling.plan.canvas import Canvas, Seed

TOLERANCE = 1e-4  # default, of a logit of float32 artefacts
PERPLEXITY_TOLERANCE = 0.01  # default, of the relative change of other artefacts
BATCHES = (1, 5)
TOKENS = 64  # at most, of a text that score and step are checked on

Function = Callable[..., Any]  # score or step, of NumPy arrays


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


def score_error(score: Function, batches: list[Tokens], wanted) -> float:
    """The largest difference of a logit."""
    return max(
        _difference(score(*labels(tokens)), want)
        for tokens, want in zip(batches, wanted, strict=True)
    )


def step_error(
    step: Function, cache: Sequence[int], cache_dtype: str, batches: list[Tokens], wanted
) -> float:
    """The largest difference of a logit, with the first half of the tokens in the cache of
    [blocks, G, K] numbers per token."""
    worst, (blocks, groups, head_width) = 0.0, cache
    for tokens, want in zip(batches, wanted, strict=True):
        (batch, width), half = tokens.token.shape, tokens.token.shape[1] // 2
        shape = blocks, batch, width + 3, groups, head_width
        keys = values = np.full(shape, 7, np.dtype(cache_dtype))  # unfilled slots must not be read
        for low, high in ((0, half), (half, width)):
            filled = np.full(batch, low, np.int32)
            logits, keys, values = step(*labels(tokens, low, high), keys, values, filled)
            worst = max(worst, _difference(logits, want[:, low:high]))
    return worst


def _difference(got, want) -> float:
    difference = np.abs(np.asarray(got) - want).max()
    return float(difference) if np.isfinite(difference) else float("inf")


# Texts.


class Texts:
    """Samples of our own plain loop, from the folded float32 network."""

    def __init__(self, config, special: SpecialIds, network: Network):
        self.config, self.special, self.network = config, special, network

    def of(self, rows: np.ndarray, seed: int, settings: Mapping[str, Any]) -> np.ndarray:
        """int32 [B, L].

        Args:
          rows: int32 [B, L], the known tokens, −1 elsewhere.
          settings: alpha_0 or fields of config.sample, by default those of the config.
        """
        config = self.config.copy_and_resolve_references()
        with config.unlocked():
            config.alpha_0 = settings.get("alpha_0", config.alpha_0)
            config.sample.update(PLAIN | {"length": rows.shape[1]})
            config.sample.update({k: v for k, v in settings.items() if k != "alpha_0"})
            if config.sample.schedule != "blockwise":
                config.sample.block_length = 0
        seeds = tuple(Seed(seed, row) for row in range(len(rows)))
        canvas = Canvas(np.maximum(rows, 0), rows >= 0, np.full(len(rows), rows.shape[1]), seeds)
        generator = generate.Generator.of(config, canvas, self.special)
        text = np.asarray(generator.run(self.network).text)
        memory.clear_jit_caches_and_trim()  # the programs of these shapes run once
        return text


PLAIN = {  # fields of config.sample for the plain loop
    "loop": "plain",
    "draft_tokens": 0,
    "draft_adaptive": False,
    "tokens_per_pass": 1,
    "confidence_threshold": 0.0,
    "stop_at_eos": False,
    "weight_dtype": "auto",
    "cache_dtype": "auto",
}


@dataclasses.dataclass(frozen=True)
class Case:
    """Texts of ours. rows: int32 [B, L], known tokens (−1 elsewhere); seed; settings of
    config.sample; text: int32 [B, L]."""

    rows: np.ndarray
    seed: int
    settings: dict
    text: np.ndarray

    @classmethod
    def of(cls, texts: Texts, rows: np.ndarray, settings: dict) -> "Case":
        return cls(rows, 0, settings, texts.of(rows, 0, settings))

    def plan(self, s: Mapping) -> tuple[dict, schedule_esolm.Passes]:
        """The settings of the run and its passes, as shipped scripts make them."""
        run = schedule_esolm.checked(s, self.settings, self.rows.shape[1])
        passes = schedule_esolm.plan_passes(run, self.rows >= 0, self.seed)
        schedule_esolm.check_passes(run, passes)
        return run, passes

    def agreement(self, text: np.ndarray) -> float:
        """The fraction of equal tokens."""
        return float(np.mean(np.asarray(text) == self.text))


def _short(s: Mapping) -> int:
    """The length of texts that step and score are checked on: whole blocks."""
    block = s["rank_block"] if s["rank_block"] <= TOKENS else 1
    return min(s["length"], max(TOKENS - TOKENS % block, block))


@dataclasses.dataclass(frozen=True)
class Reference:
    """What the model itself generates.

    Attributes:
      s: the section `sampling` of config.json.
      greedy: greedy texts, one token per pass, of each batch size.
      sampled: cases of the sampler by name: greedy, drawn, and prompted with all options.
      drawn: a case of one token per pass at temperature 1, or None with float32 weights.
      log_p: float32 [B, L, V], the log-probabilities that these tokens were drawn from.
    """

    s: dict
    greedy: list[Case]
    sampled: dict[str, list[Case]]
    drawn: Case | None
    log_p: np.ndarray | None

    def with_log_p(self, run: Function) -> "Reference":
        """With the distributions of a function of the float32 weights (a step if the model has
        one, else a score)."""
        assert self.drawn is not None
        return dataclasses.replace(self, log_p=log_probs(run, self.s, self.drawn))


def make_reference(texts: Texts, s: dict, *, with_sampler: bool, is_rounded: bool) -> Reference:
    """Our texts; log_p is None."""
    one = {"steps": 0, "schedule": _one_token(s)}
    exact, plain_settings = one | {"temperature": 0.0}, {"top_k": 0, "top_p": 1.0}
    short, sampled = _short(s), {}
    greedy = [Case.of(texts, np.full((b, short), -1, np.int32), exact) for b in BATCHES]
    drawn = None
    if is_rounded:
        rows = np.full((max(BATCHES), short), -1, np.int32)
        drawn = Case.of(texts, rows, one | plain_settings | {"temperature": 1.0})
    if with_sampler:
        for name, (settings, num_known) in _sampler_settings(s).items():
            sampled[name] = []
            for batch in BATCHES if name == "greedy" else BATCHES[-1:]:
                rows = np.full((batch, s["length"]), -1, np.int32)
                ids = np.random.default_rng(1).integers(0, s["vocab_size"] - 1, (batch, num_known))
                rows[:, :num_known] = ids + (ids >= s["mask_id"])
                sampled[name].append(Case.of(texts, rows, settings))
    return Reference(s, greedy, sampled, drawn, None)


def _one_token(s: Mapping) -> str:
    """A schedule that generates one token per pass."""
    return "ancestral" if "ancestral" in s["schedules"] else s["schedules"][0]


def _sampler_settings(s: Mapping) -> dict[str, tuple[dict, int]]:
    """(settings, known tokens) by name."""
    steps = {} if s["one_token"] else {"schedule": _one_token(s), "steps": 3}
    options = steps | {"temperature": 0.7, "top_k": 9, "top_p": 0.9}
    return {
        "greedy": ({"temperature": 0.0}, 0),
        "drawn": ({"temperature": 1.0}, 0),
        "prompted": (options, s["length"] // 4),
    }


def generated(
    run: Function,
    s: Mapping,
    case: Case,
    cache_dtype: str = "float32",
    choose: Function | None = None,
) -> np.ndarray:
    """int32 [B, L], the texts of a case by the shipped loop."""
    settings, passes = case.plan(s)
    step = run if s["has_step"] else decode_loop.without_cache(run)
    keys = decode_loop.row_keys(case.seed, len(case.rows))
    choose = choose or decode_loop.chooser(settings, keys)
    return decode_loop.run_passes(
        step, settings, passes, case.rows, choose, cache_dtype=np.dtype(cache_dtype)
    )


def log_probs(run: Function, s: Mapping, case: Case, cache_dtype: str = "float32") -> np.ndarray:
    """float32 [B, L, V]: teacher forcing, the log-probabilities of each token of the case's texts,
    given those before it in the order of generation."""
    rows = np.arange(len(case.text))[:, None]
    recorded = np.zeros((*case.text.shape, s["vocab_size"]), np.float32)

    def choose(logits, position):
        logits = np.array(logits, np.float32)
        logits[..., s["mask_id"]] = -np.inf
        logits -= logits.max(axis=-1, keepdims=True)
        recorded[rows, position] = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        return case.text[rows, position]

    generated(run, s, case, cache_dtype, choose)
    return recorded


def perplexity_figures(run: Function, reference: Reference, cache_dtype: str) -> dict[str, float]:
    """perplexity: of the float32 model on texts that it draws; perplexity_change: the relative
    change with this function, exp(KL) − 1. Both are expectations over each next token."""
    assert reference.drawn is not None and reference.log_p is not None
    ours = reference.log_p
    theirs = log_probs(run, reference.s, reference.drawn, cache_dtype)
    p = np.exp(ours, dtype=np.float64)
    with np.errstate(invalid="ignore"):
        entropy = -np.where(p > 0, p * ours, 0).sum(axis=-1).mean()
        divergence = np.where(p > 0, p * (ours - theirs), 0).sum(axis=-1).mean()
    change = float(np.expm1(divergence))
    return {
        "perplexity": float(np.exp(entropy)),
        "perplexity_change": change if np.isfinite(change) else float("inf"),
    }


@dataclasses.dataclass(frozen=True)
class Limits:
    """The largest allowed error of a logit (0 = not checked), and the largest allowed relative
    change of the perplexity."""

    logit: float
    perplexity: float


def require(file: str, measured: dict, limits: Limits) -> None:
    """UserError unless logits, perplexity and greedy texts are within the limits."""
    error = measured.get("max_logit_error", 0.0)
    if not error <= (limits.logit or np.finfo(np.float32).max):
        allowed = f"at most {limits.logit:g} (--tolerance)" if limits.logit else "finite"
        raise UserError(
            f"{file}: the largest error of a logit is {error:.1e}; must be {allowed}; nothing was "
            "exported"
        )
    change = measured.get("perplexity_change", 0.0)
    if not change <= limits.perplexity:
        raise UserError(
            f"{file}: perplexity changes by {100 * change:.2g} %; must be at most "
            f"{100 * limits.perplexity:g} % (--perplexity_tolerance); nothing was exported"
        )
    if not measured.get("greedy_identical", True):
        raise UserError(f"{file}: greedy texts differ from those of `sample`; nothing was exported")
