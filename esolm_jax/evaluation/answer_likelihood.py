"""Conditional likelihoods of answers: the prompt first in the order, then the answer.

    log p(answer | prompt) = Σ_i log p(answer_σ(i) | prompt, answer_σ(<i))

- By default σ goes from left to right, and the value is exact: that of sampling the answer from
  left to right at one token per pass. One forward pass for a batch (ar, eso_b); else the
  teacher-forced run of the sampler. Families whose masks read each other (mdlm, bd3) know the
  number of tokens of the answer.
- With K orders: log mean_k p_σk, σ_k as in training: a random share of about α₀ of the answer in
  random order, then the rest from left to right (eso_b). In expectation a lower bound on the
  likelihood under random orders. Orders depend on the seed and on the ids of the row.

Rows are padded to one of few lengths, which depends on the row alone, and batches to `batch_size`
rows: values do not depend on the batch.
"""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from esolm_jax import config as config_lib
from esolm_jax.errors import UserError
from esolm_jax.evaluation.likelihood import log_mean_exp
from esolm_jax.family import registry
from esolm_jax.model.build import BuiltModel
from esolm_jax.model.lm_head import exclude_mask_token
from esolm_jax.parallel import multihost, sharding
from esolm_jax.sampling.engine import network as network_lib
from esolm_jax.sampling.engine.network import Network
from esolm_jax.sampling.generate import Generator
from esolm_jax.sampling.plan.canvas import MASK, Canvas, Seed
from esolm_jax.sampling.plan.schedule import ancestral

_SHORTEST = 32  # tokens of the shortest padded row
LEFT_TO_RIGHT = {  # the sampler whose likelihood is exact
    "sample.schedule": "left_to_right",
    "sample.loop": "plain",
    "sample.steps": 0,
    "sample.block_length": 0,
    "sample.tokens_per_pass": 1,
    "sample.draft_tokens": 0,
    "sample.draft_adaptive": False,
    "sample.confidence_threshold": 0.0,
    "sample.stop_at_eos": False,
    "sample.top_p": 1.0,
    "sample.top_k": 0,
}


@dataclasses.dataclass(frozen=True)
class Pair:
    """Token ids of a prompt and its answer; the prompt may be empty."""

    prompt: Sequence[int]
    answer: Sequence[int]

    @property
    def ids(self) -> list[int]:
        return [*map(int, self.prompt), *map(int, self.answer)]


@dataclasses.dataclass(frozen=True)
class AnswerLikelihood:
    """Likelihoods of answers under a model on a mesh.

    Attributes:
      batch_size: rows of a forward pass. Values do not depend on it.
      num_orders: K; 0 = exact, from left to right.
      seed: of the orders.
    """

    config: ConfigDict
    built: BuiltModel
    params: dict
    batch_size: int = 8
    num_orders: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        shards = sharding.num_row_shards(self.built.mesh)
        if self.batch_size < 1 or self.batch_size % shards:
            raise UserError(
                f"batch_size={self.batch_size}: must be a positive multiple of mesh.data x "
                f"mesh.fsdp = {shards}"
            )
        if self.num_orders < 0 or (self.num_orders and self.config.objective != "eso_b"):
            raise UserError(
                f"num_orders={self.num_orders}: must be 0 (exact) with objective "
                f"{self.config.objective}; orders of the answer need eso_b"
            )

    @property
    def max_length(self) -> int:
        """Tokens of the longest prompt and answer."""
        return self.config.data.seq_len

    @functools.cached_property
    def network(self) -> Network:
        """The folded weights."""
        return network_lib.fold(self.built.model, self.params, self.built.mesh)

    def score(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        """(log p(answer | prompt) in nats, whether greedy decoding from left to right gives the
        answer) of each pair. An empty answer has (0, True).

        Raises:
          UserError: a pair has more than `max_length` tokens, or an id is out of range.
        """
        values, greedy = np.zeros(len(pairs)), np.ones(len(pairs), bool)
        for i, pair in enumerate(pairs):
            if len(pair.ids) > self.max_length:
                raise UserError(
                    f"request {i}: has {len(pair.ids)} tokens; must have at most "
                    f"data.seq_len={self.max_length}"
                )
        for rows, lengths in self._batches(pairs):
            values[rows], greedy[rows] = self._score([pairs[i] for i in rows], *lengths)
        return list(zip(values.tolist(), greedy.tolist(), strict=True))

    def _batches(self, pairs: Sequence[Pair]) -> Iterator[tuple[list[int], tuple[int, int]]]:
        """(indices of pairs with an answer, padded lengths of rows and of their answers)."""
        by_lengths: dict[tuple[int, int], list[int]] = {}
        for i, pair in enumerate(pairs):
            if len(pair.answer):
                lengths = tuple(map(self.padded_length, (len(pair.ids), len(pair.answer))))
                by_lengths.setdefault(lengths, []).append(i)
        for lengths, rows in sorted(by_lengths.items()):
            for start in range(0, len(rows), self.batch_size):
                yield rows[start : start + self.batch_size], lengths

    def padded_length(self, length: int) -> int:
        """The number of tokens of the passes of a row."""
        padded = _SHORTEST
        while padded < length:
            padded *= 2
        return min(padded, self.max_length)

    def _score(
        self, pairs: list[Pair], length: int, longest_answer: int
    ) -> tuple[np.ndarray, np.ndarray]:
        more = self.batch_size - len(pairs)
        canvas, text = self._canvas([*pairs, *pairs[:1] * more], length)
        order = np.tile(np.arange(length, dtype=np.int32), (self.batch_size, 1))
        if registry.get(self.config.objective).label_in_order is None:
            values, greedy = self._forced(canvas, text)
        else:
            run = functools.partial(self._one_pass, canvas, text, longest_answer)
            values, greedy = run(order)
            if self.num_orders:
                values = self._log_mean(canvas, run)
        return values[: len(pairs)], greedy[: len(pairs)]

    def _canvas(self, pairs: list[Pair], length: int) -> tuple[Canvas, np.ndarray]:
        """(canvas with known prompts, text), of `length` tokens; shorter rows are padded."""
        sizes = {"vocab_size": self.built.model.vocab_size, "mask_id": self.built.special.mask}
        seeds = [Seed(self.seed, zlib.crc32(np.array(pair.ids, np.int64))) for pair in pairs]
        text = Canvas.of([pair.ids for pair in pairs], seeds, **sizes).token
        unknown = [[*pair.prompt, *[MASK] * len(pair.answer)] for pair in pairs]
        canvas = Canvas.of(unknown, seeds, **sizes)
        wide = ((0, 0), (0, length - text.shape[1]))
        canvas = dataclasses.replace(
            canvas, token=np.pad(canvas.token, wide), known=np.pad(canvas.known, wide)
        )
        return canvas, np.pad(text, wide)

    def _one_pass(
        self, canvas: Canvas, text: np.ndarray, longest_answer: int, order: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        valid = np.arange(text.shape[1])[None] < canvas.length[:, None]
        arrays = text, valid, valid & ~canvas.known, order
        placed = sharding.put(arrays, sharding.rows(self.built.mesh))
        program = _program(self.config.objective, self.built, longest_answer)
        log_p, greedy = program(self.params, *placed)
        return np.asarray(log_p, np.float64), np.asarray(greedy)

    def _log_mean(self, canvas: Canvas, run: Callable) -> np.ndarray:
        values = []
        for k in range(self.num_orders):
            seeds = tuple(Seed((seed.batch + k) % 2**32, seed.row) for seed in canvas.seeds)
            drawn = ancestral(dataclasses.replace(canvas, seeds=seeds), self.config.alpha_0, 0)
            values.append(run(drawn.order)[0])
        return log_mean_exp(np.array(values).T)[0]

    def _forced(self, canvas: Canvas, text: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """By the sampler's own loop; greedy decoding gives the text if it has probability 1 at
        temperature 0."""
        found = []
        for temperature in (1.0, 0.0):
            fields = LEFT_TO_RIGHT | {"sample.temperature": temperature}
            config = config_lib.overridden(self.config, fields)
            generator = Generator.of(config, canvas, self.built.special, mesh=self.built.mesh)
            found.append(generator.log_p(self.network, text).sum(axis=1, dtype=np.float64))
        return found[0], found[1] == 0


@functools.lru_cache(maxsize=16)
def _program(objective: str, built: BuiltModel, longest_answer: int) -> Callable:
    """(params, text, valid, masked, order [B, L] each) → (log p of the masked tokens, float32 [B];
    whether each of them is the likeliest one, bool [B])."""
    label = registry.get(objective).label_in_order
    assert label is not None

    def score(params: dict, text: Any, valid: Any, masked: Any, order: Any) -> tuple:
        labelled = label(text, valid, masked, order, built.special)
        length = labelled.target.shape[1]
        h_BPD = built.apply(params, labelled.tokens, predict=(0, length), head=False)
        # The answer follows the prompt in the order: only its tokens are projected.
        first = (valid & ~masked).sum(axis=1, keepdims=True)
        column = jnp.minimum(first + jnp.arange(longest_answer)[None], length - 1)
        is_scored = jnp.arange(longest_answer)[None] < masked.sum(axis=1, keepdims=True)
        target = jnp.take_along_axis(labelled.target, column, axis=1)
        h_BPD = jnp.take_along_axis(h_BPD, column[..., None], axis=1)
        logits = _logits(built, params["logits"], h_BPD)
        chosen = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
        log_p = jnp.where(is_scored, chosen - jax.nn.logsumexp(logits, axis=-1), 0)
        is_best = jnp.argmax(logits, axis=-1) == target
        return log_p.sum(axis=1), (is_best | ~is_scored).all(axis=1)

    return multihost.together(jax.jit(score, out_shardings=sharding.replicated(built.mesh)))


def _logits(built: BuiltModel, head: dict, h_BPD: jax.Array) -> jax.Array:
    """float32 [B, P, V], the mask token excluded."""
    kernel = head["kernel"].astype(built.model.dtype)
    logits = jnp.dot(h_BPD, kernel, preferred_element_type=jnp.float32)
    if "bias" in head:
        logits = logits + head["bias"][None, None]
    return exclude_mask_token(logits, built.special.mask)


def rolling_windows(num_tokens: int, length: int) -> list[tuple[int, int, int]]:
    """(start, first new token, end) of windows of at most `length` tokens in which each token is
    scored once. Later windows overlap by a token, the last one by as many as fill it."""
    if length < 2:
        raise UserError(f"max_length={length}: must be at least 2 for rolling windows")
    windows, done = [], 0
    while done < num_tokens:
        end = min(done + length - (done > 0), num_tokens)
        windows.append((max(0, end - length), done, end))
        done = end
    return windows
