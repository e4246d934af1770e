"""Parameter names of GPT-2, Llama and Qwen on the Hugging Face hub ↔ paths in our pytree. Dream
has Qwen 2's names, SDAR those of Qwen 3; LLaDA's are in llada.py.

One table for both directions: a tensor of the hub is a view of one of our parameters, possibly
transposed. Our embeddings are untied and also have the mask token; a tied one is used twice.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from esolm_jax.model.model_config import ModelConfig

# Constants and masks in older files.
BUFFERS = re.compile(r".*(rotary_emb\.inv_freq|\.attn\.(masked_)?bias)$")


@dataclasses.dataclass(frozen=True)
class HubTensor:
    """A tensor of the hub as a view of our parameters.

    Attributes:
      name, shape: those of the hub's tensor.
      path: the path of our parameter.
      block: index along the leading axis of our parameter, or None outside of the blocks.
      transposed: whether the hub's tensor is (out, in).
      view: our parameter (of this block) → the NumPy view that holds this tensor.
      scale: our parameter is the hub's tensor times this number.
    """

    name: str
    shape: tuple[int, ...]
    path: str
    block: int | None = None
    transposed: bool = False
    view: Callable[[Any], Any] = lambda ours: ours
    scale: float = 1.0

    def put(self, ours: np.ndarray, tensor: np.ndarray) -> None:
        """Writes the hub's tensor, of any float dtype, into our parameter."""
        ours = self.view(ours if self.block is None else ours[self.block])
        ours[...] = (tensor.T if self.transposed else tensor).reshape(ours.shape)
        if self.scale != 1:
            ours *= np.float32(self.scale)

    def get(self, ours: np.ndarray) -> np.ndarray:
        """The hub's tensor, from our parameter; the inverse of `put`."""
        ours = self.view(ours if self.block is None else ours[self.block])
        return ours.reshape(self.shape[::-1]).T if self.transposed else ours.reshape(self.shape)


def hub_tensors(model: ModelConfig, ids: int, *, tied: bool, prefix: str) -> list[HubTensor]:
    """All tensors of a model, in the order in which they are used.

    Args:
      ids: rows of the hub's embedding: our vocabulary without the mask token at its end.
      tied: whether the embedding also serves as lm_head.
      prefix: the prefix of all names but lm_head's: "model.", "transformer." or "".
    """
    block, around = (_gpt2_block, _GPT2) if model.style == "gpt2" else (_llama_block, _LLAMA)
    width = model.width
    embedding, final_norm = prefix + around["embedding"], prefix + around["final_norm"]
    head = embedding if tied else "lm_head.weight"
    tensors = [
        HubTensor(embedding, (ids, width), "embedding/embedding", view=lambda ours: ours[:ids]),
        HubTensor(final_norm + ".weight", (width,), "final_norm/scale"),
        HubTensor(head, (ids, width), "logits/kernel", None, True, lambda ours: ours[:, :ids]),
    ]
    if model.style == "gpt2":
        tensors.append(HubTensor(final_norm + ".bias", (width,), "final_norm/bias"))
    if model.max_positions:
        shape = model.max_positions, width
        tensors.append(HubTensor(prefix + around["positions"], shape, "positions/embedding"))
    for i in range(model.blocks):
        for part in block(model):
            name = f"{prefix}{around['blocks']}.{i}.{part.name}"
            path = f"blocks/{part.path}"
            tensors.append(dataclasses.replace(part, name=name, path=path, block=i))
    return tensors


_LLAMA = {"embedding": "embed_tokens.weight", "final_norm": "norm", "blocks": "layers"}
_GPT2 = {
    "embedding": "wte.weight",
    "final_norm": "ln_f",
    "blocks": "h",
    "positions": "wpe.weight",
}


def _llama_block(model: ModelConfig) -> list[HubTensor]:
    """Tensors of Llama and Mistral, Qwen 2 (biases) and Qwen 3 (norms). Our queries are stored with
    the key and the value of their group, [D, G, R + 2, K]."""
    width, inner, one = model.width, model.inner, model.head_width
    groups = model.groups * one
    heads = {
        "q": (model.heads * one, lambda ours: ours[..., :-2, :]),
        "k": (groups, lambda ours: ours[..., -2, :]),
        "v": (groups, lambda ours: ours[..., -1, :]),
    }
    tensors = [HubTensor("input_layernorm.weight", (width,), "attention_norm/scale")]
    for letter, (size, view) in heads.items():
        name = f"self_attn.{letter}_proj"
        tensors.append(HubTensor(f"{name}.weight", (size, width), "qkv/kernel", None, True, view))
        if model.qkv_bias:
            tensors.append(HubTensor(f"{name}.bias", (size,), "qkv/bias", view=view))
    if model.qk_norm:
        tensors.append(HubTensor("self_attn.q_norm.weight", (one,), "q_norm/scale"))
        tensors.append(HubTensor("self_attn.k_norm.weight", (one,), "k_norm/scale"))
    out = width, model.heads * one
    gate, up = (lambda ours: ours[:, 0]), (lambda ours: ours[:, 1])
    first, second = (lambda ours: ours[0]), (lambda ours: ours[1])
    if model.out_bias:
        tensors.append(HubTensor("self_attn.o_proj.bias", (width,), "attention_out/bias"))
    if model.mlp_bias:
        tensors.append(HubTensor("mlp.gate_proj.bias", (inner,), "mlp_in/bias", view=first))
        tensors.append(HubTensor("mlp.up_proj.bias", (inner,), "mlp_in/bias", view=second))
        tensors.append(HubTensor("mlp.down_proj.bias", (width,), "mlp_out/bias"))
    return tensors + [
        HubTensor("self_attn.o_proj.weight", out, "attention_out/kernel", transposed=True),
        HubTensor("post_attention_layernorm.weight", (width,), "mlp_norm/scale"),
        HubTensor("mlp.gate_proj.weight", (inner, width), "mlp_in/kernel", None, True, gate),
        HubTensor("mlp.up_proj.weight", (inner, width), "mlp_in/kernel", None, True, up),
        HubTensor("mlp.down_proj.weight", (width, inner), "mlp_out/kernel", transposed=True),
    ]


def _gpt2_block(model: ModelConfig) -> list[HubTensor]:
    """GPT-2's own linear layers are (in, out); all queries come first, then keys, then values."""
    width, inner = model.width, model.inner

    def by_kind(ours):  # [D, H, 3, K] → [D, 3, H, K], the bias likewise
        return np.moveaxis(ours, -2, -3)

    tensors = []
    for theirs, ours in (("ln_1", "attention_norm"), ("ln_2", "mlp_norm")):
        tensors.append(HubTensor(f"{theirs}.weight", (width,), f"{ours}/scale"))
        tensors.append(HubTensor(f"{theirs}.bias", (width,), f"{ours}/bias"))
    return tensors + [
        HubTensor("attn.c_attn.weight", (width, 3 * width), "qkv/kernel", view=by_kind),
        HubTensor("attn.c_attn.bias", (3 * width,), "qkv/bias", view=by_kind),
        HubTensor("attn.c_proj.weight", (width, width), "attention_out/kernel"),
        HubTensor("attn.c_proj.bias", (width,), "attention_out/bias"),
        HubTensor("mlp.c_fc.weight", (width, inner), "mlp_in/kernel"),
        HubTensor("mlp.c_fc.bias", (inner,), "mlp_in/bias"),
        HubTensor("mlp.c_proj.weight", (inner, width), "mlp_out/kernel"),
        HubTensor("mlp.c_proj.bias", (width,), "mlp_out/bias"),
    ]
