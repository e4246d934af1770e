"""Inputs and outputs of the exported functions, for StableHLO, ONNX and the manifest."""

import dataclasses

from esolm_jax.model.model_config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Array:
    """Attributes:
    dtype: of NumPy.
    shape: numbers, and names of dynamic dimensions: b rows, t or w tokens, s slots of the cache.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def to_json(self) -> dict:
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.shape)}


@dataclasses.dataclass(frozen=True)
class Signature:
    """Arrays in order; StableHLO takes the dict of the weights before them."""

    inputs: tuple[Array, ...]
    outputs: tuple[Array, ...]


def _labels(tokens: str) -> tuple[Array, ...]:
    names = {"token": "int32", "position": "int32", "rank": "int32", "in_context": "bool"}
    return tuple(Array(name, dtype, ("b", tokens)) for name, dtype in names.items())


def score(model: ModelConfig) -> Signature:
    """Labelled tokens → logits, including the mask token's."""
    return Signature(_labels("t"), (Array("logits", "float32", ("b", "t", model.vocab_size)),))


def step(model: ModelConfig) -> Signature:
    """Labelled tokens and the cache → logits, and the cache with the tokens in it."""
    shape = (model.blocks, "b", "s", model.groups, model.head_width)
    keys, values = (Array(name, "float32", shape) for name in ("keys", "values"))
    logits = Array("logits", "float32", ("b", "w", model.vocab_size))
    filled = Array("filled", "int32", ("b",))
    return Signature((*_labels("w"), keys, values, filled), (logits, keys, values))


def sample(length: int) -> Signature:
    """One key per row, the temperature (0 = greedy), the position generated at each rank, and the
    number of diffusion ranks (decode_loop.draw_orders) → token ids in text order."""
    text, order = (Array(name, "int32", ("b", length)) for name in ("text", "order"))
    keys, temperature = Array("keys", "uint32", ("b", 2)), Array("temperature", "float32", ())
    return Signature((keys, temperature, order, Array("num_diffusion", "int32", ("b",))), (text,))
