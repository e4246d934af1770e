"""Inputs and outputs of the exported functions, for StableHLO, ONNX and the manifest."""

import dataclasses

from esolm_jax.model.model_config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Array:
    """Attributes:
    dtype: of NumPy or ml_dtypes.
    shape: numbers, and names of dynamic dimensions: b rows, t or w tokens, s slots of the cache;
      of the sampler, see exported_sampler.py (each table has a name's first letter before n, v, p).
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


def step(model: ModelConfig, cache_dtype: str) -> Signature:
    """Labelled tokens and the cache → logits, and the cache with the tokens in it."""
    shape = (model.blocks, "b", "s", model.groups, model.head_width)
    keys, values = (Array(name, cache_dtype, shape) for name in ("keys", "values"))
    logits = Array("logits", "float32", ("b", "w", model.vocab_size))
    filled = Array("filled", "int32", ("b",))
    return Signature((*_labels("w"), keys, values, filled), (logits, keys, values))


def sample() -> Signature:
    """One key per row, settings (temperature 0 = greedy, top_k 0 = off, top_p 1 = off), known
    tokens (−1 elsewhere), the position generated at each rank, and the passes → token ids in text
    order."""
    text, order = (Array(name, "int32", ("b", "l")) for name in ("text", "order"))
    settings = {"temperature": "float32", "top_k": "int32", "top_p": "float32"}
    return Signature(
        (
            Array("keys", "uint32", ("b", 2)),
            *(Array(name, dtype, ()) for name, dtype in settings.items()),
            text,
            order,
            *(array for name in ("prompt", "wide", "narrow") for array in _table(name)),
        ),
        (Array("text", "int32", ("b", "l")),),
    )


def _table(name: str) -> tuple[Array, ...]:
    passes, window, picks = (f"{name[0]}{dim}" for dim in "nvp")
    return (
        Array(f"{name}_passes", "int32", (passes, 5, "b")),
        Array(f"{name}_window", "int32", (window,)),
        Array(f"{name}_picks", "int32", (picks,)),
    )
