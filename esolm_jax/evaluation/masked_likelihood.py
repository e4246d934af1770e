"""Likelihoods of answers from draws of masks: the protocols of LLaDA, Dream and Duo.

They mask a part of the tokens and weight the cross-entropy of each masked token:
log p ≈ −mean over draws of Σ weight · (−log p of the token).

llada   exactly l of the N tokens of an answer, l about uniform on 1..N, with weight N/l
dream   each of them with probability p, with weight 1/p
duo     each token of BOS, prompt, answer and EOS; see protocol/multiple_choice.py

In pretrained models the mask token keeps its probability, as in their protocols; in those of this
package it has none, as in training.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from esolm_jax.evaluation import known_tokens
from esolm_jax.evaluation.protocol import multiple_choice as mc
from esolm_jax.family import registry
from esolm_jax.family.labels import Tokens
from esolm_jax.family.noise import EPS
from esolm_jax.interop.hub import from_esolm
from esolm_jax.model import lm_head
from esolm_jax.model.build import BuiltModel
from esolm_jax.parallel import multihost, sharding

DREAM_EPS = 1e-3  # the least p
_NO_TOKEN = -1
_LENGTHS = 32  # texts are padded to a multiple, so that few programs are compiled


@dataclasses.dataclass(frozen=True)
class Draws:
    """Masks of one text of n tokens.

    Attributes:
      masked: bool [draws, n]. weight: float [draws, n], of masked tokens; 0 elsewhere.
    """

    masked: np.ndarray
    weight: np.ndarray


def llada_draws(rng: np.random.Generator, prompt: int, answer: int, draws: int, rows: int) -> Draws:
    """Masks over an answer of `answer` tokens behind `prompt` tokens, stratified in batches of
    `rows` draws, which must divide `draws`."""
    of_answer = mc.draw_masks(rng, answer, draws, rows)
    before = ((0, 0), (prompt, 0))
    return Draws(np.pad(of_answer, before), np.pad(mc.llada_weight(of_answer), before))


def dream_draws(rng: np.random.Generator, prompt: int, answer: int, draws: int, rows: int) -> Draws:
    """As llada_draws. The first and the last token of the text are never masked."""
    start = rng.random((draws // rows, 1))
    t = (start + np.arange(rows)[None] / rows) % 1
    p = ((1 - DREAM_EPS) * t + DREAM_EPS).reshape(-1, 1)
    position = np.arange(prompt + answer)
    may = (position >= max(1, prompt)) & (position < prompt + answer - 1)
    masked = (rng.random((draws, len(position))) < p) & may[None]
    return Draws(masked, masked / p)


def duo_draws(
    rng: np.random.Generator, prompt: int, answer: int, draws: int, *, suffix: bool
) -> Draws:
    """Masks over BOS, prompt, answer and EOS; `suffix`: only those of answer and EOS count."""
    prefix, length = 1 + prompt, prompt + answer + 2
    t = EPS + (1 - EPS) * ((rng.random() + np.arange(draws)) / draws)
    masks = rng.random((draws, length)) < (1 - EPS) * t[:, None]
    if not suffix:
        return Draws(masks, mc.duo_full_weight(masks, t))
    return Draws(masks & (np.arange(length) >= prefix), mc.duo_suffix_weight(masks, prefix))


def is_pretrained(meta: dict) -> bool:
    """Whether a checkpoint with this meta is of a model of the hub that was trained elsewhere."""
    converted = meta.get("converted")
    model_type = converted.get("model_type") if isinstance(converted, dict) else None
    return model_type not in (None, from_esolm.MODEL_TYPE)


@dataclasses.dataclass(frozen=True)
class MaskedLikelihood:
    """Cross-entropies of masked tokens under a model on a mesh.

    Attributes:
      rows: texts of a forward pass, a multiple of the row shards of the mesh.
      keeps_mask: whether the mask token keeps its probability; see is_pretrained.
      cfg: strength of classifier-free guidance, u + (cfg + 1)(c − u) of the logits c, and u of the
        text without its prompt.
    """

    config: ConfigDict
    built: BuiltModel
    params: dict
    rows: int
    keeps_mask: bool = False
    cfg: float = 0.0

    @property
    def is_shifted(self) -> bool:
        """Whether the row of a token predicts the token after it; the first one is given."""
        return registry.get(self.config.objective).predicts_next

    @property
    def _head(self) -> lm_head.Head:
        head = self.built.head
        return dataclasses.replace(head, mask_id=_NO_TOKEN) if self.keeps_mask else head

    def nll(self, ids: Sequence[int], draws: Draws, *, prompt: int = 0) -> np.ndarray:
        """Σ weight · (−log p) of each draw: float64 [draws]; NaN where a weight is NaN.

        Args:
          prompt: tokens that guidance leaves out.
        """
        if np.isnan(draws.weight).any():
            return np.where(np.isnan(draws.weight).any(axis=1), np.nan, 0.0)
        total, text = np.zeros(len(draws.masked)), np.array(ids, np.int32)
        (drawn,) = np.nonzero(draws.masked.any(axis=1))
        for start in range(0, len(drawn), self.rows):
            these = drawn[start : start + self.rows]
            masked = draws.masked[np.resize(these, self.rows)]
            found = self._run(_nll_program, text, masked, prompt)[0]
            weight = draws.weight[these].astype(np.float64)
            total[these] = (weight * found[: len(these)]).sum(axis=1)
        return total

    def best_of(self, prompt: int = 0) -> mc.BestOf:
        """ids int [1, n] → the likeliest token at each masked position, and its log-probability."""

        def best(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            shards = sharding.num_row_shards(self.built.mesh)
            masked = np.tile(ids == self.built.special.mask, (shards, 1))
            token, log_p = self._run(_best_program, ids[0], masked, prompt)
            return token[:1].astype(np.int64), log_p[:1]

        return best

    def _run(
        self, make: Callable, text: np.ndarray, masked: np.ndarray, prompt: int
    ) -> list[np.ndarray]:
        """The results of a program for a text with each of these masks [B, n], in text order."""
        mask_id, length = self.built.special.mask, masked.shape[1]
        if self.is_shifted:
            masked = masked & (np.arange(length) > 0)
        ids = np.where(masked, mask_id, text).astype(np.int32)
        inputs = [self._padded(ids)]
        if self.cfg:
            inputs.append(self._padded(np.where(np.arange(length) < prompt, mask_id, ids)))
        width = inputs[0][1].shape[1]
        target = np.tile(np.pad(text, (0, width - length)), (len(masked), 1))
        wanted = np.pad(masked, ((0, 0), (0, width - length))).astype(np.float32)
        if self.is_shifted:
            target, wanted = (np.roll(a, -1, axis=1) for a in (target, wanted))
        placed = sharding.put((inputs, target, wanted), sharding.rows(self.built.mesh))
        found = make(self.built, self._head, self.cfg)(self.params, *placed)
        found = [np.asarray(a, np.float64) for a in found]
        return [(np.roll(a, 1, axis=1) if self.is_shifted else a)[:, :length] for a in found]

    def _padded(self, ids: np.ndarray) -> tuple[Tokens, np.ndarray]:
        """(labelled tokens; the column of each position), padded by tokens that no other reads."""
        tokens = known_tokens.label(self.config, self.built, ids)
        token, position, rank, in_context = map(
            np.asarray, (tokens.token, tokens.position, tokens.rank, tokens.in_context)
        )
        rows, length = ids.shape
        width = _LENGTHS * math.ceil(length / _LENGTHS)
        column = np.argsort(position, axis=1).astype(np.int32)
        behind = np.tile(np.arange(length, width, dtype=np.int32), (rows, 1))
        wide = ((0, 0), (0, width - length))
        padded = Tokens(
            np.pad(token, wide),
            np.pad(position, wide),
            np.pad(rank, wide, constant_values=rank.max() + 1),
            np.pad(in_context, wide, constant_values=True),
        )
        return padded, np.concatenate([column, behind], axis=1)


def _hidden(built: BuiltModel, cfg: float, params: dict, inputs: list) -> jax.Array:
    """[B, T, D] in text order. The logits are linear in it, so guidance applies to it."""
    found = []
    for tokens, column in inputs:
        h_BTD = built.apply(params, tokens, predict=(0, column.shape[1]), head=False)
        found.append(jnp.take_along_axis(h_BTD, column[..., None], axis=1))
    if not cfg:
        return found[0]
    conditional, unconditional = found
    return unconditional + (cfg + 1) * (conditional - unconditional)


@functools.lru_cache(maxsize=8)
def _nll_program(built: BuiltModel, head: lm_head.Head, cfg: float) -> Callable:
    """(params, inputs, target, wanted) → (−log p of targets that are wanted, 0 elsewhere: float32
    [B, T],)."""

    def nll(params, inputs, target, wanted):
        hidden = (_hidden(built, cfg, params, inputs),)
        return lm_head.nll(head, hidden, params["logits"], (target,), (wanted,))

    return multihost.together(jax.jit(nll, out_shardings=sharding.replicated(built.mesh)))


@functools.lru_cache(maxsize=8)
def _best_program(built: BuiltModel, head: lm_head.Head, cfg: float) -> Callable:
    """(params, inputs, target, wanted) → (likeliest tokens, their log-probabilities): [B, T]."""

    def best(params, inputs, target, wanted):
        del target, wanted
        h_BTD, kernel = _hidden(built, cfg, params, inputs), params["logits"]["kernel"]
        logits = jnp.dot(h_BTD, kernel.astype(h_BTD.dtype), preferred_element_type=jnp.float32)
        if "bias" in params["logits"]:
            logits = logits + params["logits"]["bias"][None, None]
        if head.mask_id != _NO_TOKEN:
            logits = lm_head.exclude_mask_token(logits, head.mask_id)
        log_p = jax.nn.log_softmax(logits)
        return jnp.argmax(log_p, axis=-1).astype(jnp.float32), log_p.max(axis=-1)

    return multihost.together(jax.jit(best, out_shardings=sharding.replicated(built.mesh)))
