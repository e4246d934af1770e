"""The judge of generated texts: an autoregressive model that scores tokens."""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from esolm_jax.data.hub_tokenizer import HubTokenizer
from esolm_jax.data.wordpieces import WordPieces
from esolm_jax.errors import UserError
from esolm_jax.evaluation.protocol import judge_source
from esolm_jax.family.labels import Layout, Tokens
from esolm_jax.model import lm_head
from esolm_jax.model import transformer as model_lib
from esolm_jax.model.model_config import ModelConfig
from esolm_jax.parallel import multihost, sharding

_LOGITS_AT_ONCE = 1024  # tokens whose logits are in memory together
_SHORTEST, _GROWTH = 256, 4  # lengths of a forward pass: 256, 1024, 4096, …
EOS_TEXT = "[EOS]"  # how `sample` spells EOS


class Judge:
    """A GPT-2, Llama or Qwen of a folder of the Hugging Face hub, or the `ar` model of a workdir,
    in float32, sharded over a mesh.

    Attributes:
      eos_id, vocab_size: of its tokenizer. eos_text: the spelling that `encode` turns into EOS.
      scores_first: whether the first token of a row can be scored. It is predicted from the start
        token of a workdir's model; a pretrained model has none.
      context_length: tokens of a context that the model was trained with; at most 1024 if
        pretrained.
    """

    def __init__(self, folder: str | Path, *, rows: int = 0, mesh: Mesh | None = None):
        """Reads the folder.

        Args:
          folder: config.json, *.safetensors and the tokenizer's files; or a workdir.
          rows: rows of one forward pass, 0 = 8 for each device. Scores do not depend on it.
          mesh: None = one device.

        Raises:
          UserError: an unsupported architecture, missing or damaged files, or `rows` that do not
            divide by the devices that rows are split over.
        """
        self._mesh = judge_source.one_device() if mesh is None else mesh
        shards = sharding.num_row_shards(self._mesh)
        rows = rows or 8 * shards
        if rows < 1 or rows % shards:
            raise UserError(
                f"batch_size={rows}: must be a positive multiple of mesh.data x mesh.fsdp = "
                f"{shards}, the devices that rows are split over"
            )
        self._source, self._rows = judge_source.read(folder, self._mesh), rows
        tokenizer = self._source.tokenizer
        self.eos_id: int = tokenizer.eos_id
        self.vocab_size: int = tokenizer.vocab_size
        self.scores_first = self._source.start_id is not None
        self.context_length = self._source.context_length
        self.eos_text = EOS_TEXT
        if isinstance(tokenizer, WordPieces | HubTokenizer):
            specials = ("<|endoftext|>",) if tokenizer.kind == "gpt2" else ()
            self._library = tokenizer.recognizing(specials)
            self.eos_text = self._library.id_to_token(self.eos_id)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text with the special tokens that the judge's own tokenizer adds (GPT-2:
        none). Special tokens that a text spells out become these tokens; of tokenizers without
        tokenizer.json only EOS."""
        tokenizer = self._source.tokenizer
        if isinstance(tokenizer, WordPieces | HubTokenizer):
            return [encoding.ids for encoding in self._library.encode_batch(list(texts))]
        found = []
        for text in texts:
            first, *rest = (tokenizer.encode(part) for part in text.split(EOS_TEXT))
            found.append(first + [i for part in rest for i in (self.eos_id, *part)])
        return found

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens spelled out."""
        tokenizer = self._source.tokenizer
        if isinstance(tokenizer, WordPieces | HubTokenizer):
            return self._library.decode(list(ids), skip_special_tokens=False)
        return tokenizer.decode(ids)

    def score(self, ids: np.ndarray, scored: np.ndarray) -> np.ndarray:
        """−log p of tokens, each given those before it in its row, in nats.

        Rows are cut behind their last scored token and padded to one of few lengths, and rows
        without a scored token are not run; few programs are compiled, independent of T.

        Args:
          ids: int [n, T]. scored: bool [n, T]; the first column only if `scores_first`.

        Returns:
          float32 [n, T], 0 at tokens that are not scored.

        Raises:
          UserError: T is more than the judge's number of positions, or an id is out of range.
        """
        self.check(ids)
        nll = np.zeros(ids.shape, np.float32)
        last = ids.shape[1] - np.argmax(scored[:, ::-1], axis=1)
        inputs = np.where(scored.any(axis=1), last - 1 + self._lead, 0)
        for rows, length in self._batches(inputs):
            end = min(length + 1 - self._lead, ids.shape[1])
            full, weight = self._placed(ids[rows, :end], length, scored[rows, :end])
            found = self._run(_nll_program, full[:, :-1], full[:, 1:], weight[:, 1:])
            found = np.pad(found, ((0, 0), (1, 0)))  # of `full`
            nll[rows, :end] = found[: len(rows), self._lead : self._lead + end]
        return nll

    def features(self, ids: Sequence[Sequence[int]]) -> np.ndarray:
        """Hidden state of the last token of each row, the input of the head: float32 [n, D].

        Raises:
          UserError: a row is empty or has more than `feature_length` tokens, or an id is out of
            range.
        """
        inputs = np.array([len(row) for row in ids], np.int64) + self._lead
        if not (inputs > self._lead).all():
            raise UserError(f"text {inputs.argmin()}: must have a token")
        padded = pad_rows(ids, self.eos_id)
        self.check(padded, inputs=int(inputs.max()))
        found = np.zeros((len(ids), self._source.model.width), np.float32)
        for rows, length in self._batches(inputs):
            full, _ = self._placed(padded[rows, : length - self._lead], length)
            last = np.zeros(self._rows, np.int32)
            last[: len(rows)] = inputs[rows] - 1
            found[rows] = self._run(_features_program, full[:, :-1], last)[: len(rows)]
        return found

    @property
    def feature_length(self) -> int:
        """Tokens of a text that fill a context, with the start token if there is one."""
        return self.context_length - self._lead

    @property
    def _lead(self) -> int:
        """Tokens in front of a row."""
        return int(self.scores_first)

    def _batches(self, inputs: np.ndarray) -> Iterator[tuple[np.ndarray, int]]:
        """(rows, length of their forward pass) of rows with so many inputs; 0 = no pass."""
        shortest = 0
        for length in self._lengths(int(inputs.max(initial=0))):
            (chosen,) = np.nonzero((inputs > shortest) & (inputs <= length))
            for start in range(0, len(chosen), self._rows):
                yield chosen[start : start + self._rows], length
            shortest = length

    def _lengths(self, width: int) -> Iterator[int]:
        """Lengths of forward passes, up to the first that holds `width` tokens."""
        length, longest = _SHORTEST, self._source.model.max_positions or math.inf
        while length < min(width, longest):
            yield length
            length *= _GROWTH
        yield int(min(length, longest))

    def _placed(
        self, ids: np.ndarray, length: int, scored: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """(ids behind the start token, their weights), int32 and float32 [rows, length + 1]."""
        full = np.full((self._rows, length + 1), self.eos_id, np.int32)
        weight = np.zeros(full.shape, np.float32)
        if self._source.start_id is not None:
            full[:, 0] = self._source.start_id
        place = np.s_[: len(ids), self._lead : self._lead + ids.shape[1]]
        full[place] = ids
        if scored is not None:
            weight[place] = scored
        return full, weight

    def _run(self, make: Callable, *arrays: np.ndarray) -> np.ndarray:
        """A program on rows of the mesh."""
        program = make(self._source.model, self._source.mask_id, self._mesh)
        local = sharding.local_rows(self._mesh, self._rows)
        batch = {str(i): array[local] for i, array in enumerate(arrays)}
        placed = sharding.put_batch(batch, self._mesh, self._rows)
        return np.asarray(program(self._source.params, *placed.values()))

    def check(self, ids: np.ndarray, inputs: int = 0) -> None:
        """UserError unless rows [n, T] fit the judge's vocabulary, and T or `inputs` tokens its
        positions."""
        longest, length = self._source.model.max_positions, max(ids.shape[1], inputs)
        if longest and length > longest:
            raise UserError(
                f"context_length={length}: must be at most {longest}, the judge's number of "
                "positions"
            )
        if ids.size and not 0 <= ids.min() <= ids.max() < self.vocab_size:
            wrong = ids.min() if ids.min() < 0 else ids.max()
            raise UserError(f"texts: token id {wrong}: must be below the judge's {self.vocab_size}")


def pad_rows(rows: Sequence[Sequence[int]], pad_id: int) -> np.ndarray:
    """int32 [n, longest]: rows of ids, padded at the end."""
    ids = np.full((len(rows), max(map(len, rows), default=0)), pad_id, np.int32)
    for padded, row in zip(ids, rows, strict=True):
        padded[: len(row)] = row
    return ids


def _hidden(model: ModelConfig, mesh: Mesh, params: dict, token_BT: Any) -> jax.Array:
    """[B, T, D]: inputs of the head; no token reads a later one."""
    index = jnp.broadcast_to(jnp.arange(token_BT.shape[1], dtype=jnp.int32), token_BT.shape)
    layout = Layout(token_BT.shape[1])
    tokens = Tokens(token_BT, index, index, jnp.ones(token_BT.shape, bool), layout)
    return model_lib.bind(model, mesh)(params, tokens, head=False)


def _jit(function: Callable, mesh: Mesh) -> Callable:
    """One program of all processes, in full precision, with replicated results."""

    def precise(*args: Any) -> jax.Array:
        with jax.default_matmul_precision("highest"):
            return function(*args)

    return multihost.together(jax.jit(precise, out_shardings=sharding.replicated(mesh)))


@functools.lru_cache(maxsize=8)
def _nll_program(model: ModelConfig, mask_id: int, mesh: Mesh) -> Callable:
    """(params, input [B, T], target [B, T], weight [B, T]) → float32 [B, T]: −log p of targets with
    a weight, 0 elsewhere."""
    head = lm_head.Head.of(model, mask_id, mesh, chunk=_LOGITS_AT_ONCE)

    def nll(params: dict, token_BT: Any, target_BT: Any, weight_BT: Any) -> jax.Array:
        hidden = (_hidden(model, mesh, params, token_BT),)
        (found,) = lm_head.nll(head, hidden, params["logits"], (target_BT,), (weight_BT,))
        return found

    return _jit(nll, mesh)


@functools.lru_cache(maxsize=8)
def _features_program(model: ModelConfig, mask_id: int, mesh: Mesh) -> Callable:
    """(params, input [B, T], last [B]) → float32 [B, D]: the hidden state of each last token."""
    del mask_id

    def features(params: dict, token_BT: Any, last_B: Any) -> jax.Array:
        hidden_BTD = _hidden(model, mesh, params, token_BT)
        last = jnp.take_along_axis(hidden_BTD, last_B[:, None, None], axis=1)
        return last[:, 0].astype(jnp.float32)

    return _jit(features, mesh)
