"""Parameter names of an exported Eso-LM in `transformers` ↔ paths in our pytree.

A tensor is one of our parameters, of one block: `blocks.<i>.qkv.weight` is block i of
`blocks/qkv/kernel`, with the kernel of a linear layer as (out, in).
"""

import math

import jax

from esolm_jax.interop.hub.names import HubTensor
from esolm_jax.model import transformer as model_lib
from esolm_jax.model.model_config import ModelConfig
from esolm_jax.process import prng

_NAMES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}


def abstract_params(model: ModelConfig) -> dict:
    """Shapes and dtypes of our parameters."""
    return jax.eval_shape(lambda: model_lib.init(model, prng.key(0)))


def tensors(model: ModelConfig) -> list[HubTensor]:
    """All tensors of a model: embeddings and head, then the blocks."""
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_params(model)):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if not name.startswith("blocks/"):
            found.append(_tensor(name, leaf.shape, None))
            continue
        found += [_tensor(name, leaf.shape[1:], i) for i in range(model.blocks)]
    return sorted(found, key=lambda part: -1 if part.block is None else part.block)


def _tensor(path: str, shape: tuple[int, ...], block: int | None) -> HubTensor:
    *modules, leaf = path.split("/")
    if block is not None:
        modules.insert(1, str(block))
    name, is_kernel = ".".join([*modules, _NAMES[leaf]]), leaf == "kernel"
    if is_kernel:
        shape = math.prod(shape[1:]), shape[0]
    elif leaf != "embedding":
        shape = (math.prod(shape),)
    return HubTensor(name, shape, path, block, is_kernel)
