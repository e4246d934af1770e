"""LLaDA's config.json and parameter names, in those of a Llama.

LLaDA is a Llama without a causal mask. Its configuration class has the names and the defaults of
another code base, most of whose options no published LLaDA uses; these are refused by name.
"""

import dataclasses
from typing import Any

from esolm_jax.errors import UserError
from esolm_jax.interop.hub.names import HubTensor
from esolm_jax.interop.shown import shown

MODEL_TYPE = "llada"

# Their field → (ours, LLaDA's default).
_RENAMED = {
    "hidden_size": ("d_model", None),
    "num_hidden_layers": ("n_layers", None),
    "num_attention_heads": ("n_heads", None),
    "num_key_value_heads": ("n_kv_heads", None),
    "intermediate_size": ("mlp_hidden_size", None),
    "rms_norm_eps": ("rms_norm_eps", 1e-5),
    "rope_theta": ("rope_theta", 10_000.0),
    "max_position_embeddings": ("max_sequence_length", 1024),
    "tie_word_embeddings": ("weight_tying", True),
    "vocab_size": ("vocab_size", None),
    "bos_token_id": ("bos_token_id", None),
    "eos_token_id": ("eos_token_id", None),
    "pad_token_id": ("pad_token_id", None),
    "mask_token_id": ("mask_token_id", None),
    "quantization_config": ("quantization_config", None),
}
# Field → (supported values, LLaDA's default). Null means "off", or "as include_bias".
_OFF = ((False, None), False)
_ALLOWED = {
    "block_type": (("llama",), "sequential"),
    "activation_type": (("silu",), "swiglu"),
    "layer_norm_type": (("rms",), "default"),
    "rope": ((True,), False),
    "alibi": _OFF,
    "include_bias": _OFF,
    "include_qkv_bias": _OFF,
    "bias_for_layer_norm": _OFF,
    "attention_layer_norm": _OFF,
    "multi_query_attention": _OFF,
    "layer_norm_with_affine": ((True,), True),
    "block_group_size": ((1,), 1),
}


def as_llama(hub: dict[str, Any], where: str) -> dict[str, Any]:
    """LLaDA's config.json with the names of Llama's. Adds `logits_scale` and `embedding_scale`.
    UserError that lists every unsupported part."""
    wrong = [
        f"{name}={shown(hub.get(name, default))} (allowed: {shown(values[0])})"
        for name, (values, default) in _ALLOWED.items()
        if hub.get(name, default) not in values
    ]
    for name in ("scale_logits", "input_emb_norm"):
        if not isinstance(hub.get(name, False), bool):
            wrong.append(f"{name}={shown(hub[name])} (allowed: true, false)")
    if wrong:
        raise UserError(f"{where}: an unsupported architecture: {'; '.join(wrong)}")
    llama = {name: hub.get(theirs, default) for name, (theirs, default) in _RENAMED.items()}
    width = llama["hidden_size"]
    if llama["intermediate_size"] is None and type(width) is int:
        ratio = hub.get("mlp_ratio", 4)
        llama["intermediate_size"] = ratio * width if type(ratio) is int else ratio
    if hub.get("embedding_size") is not None:  # the vocabulary, padded
        llama["vocab_size"] = hub["embedding_size"]
    root = width**0.5 if type(width) is int and width > 0 else 1.0
    llama["logits_scale"] = 1 / root if hub.get("scale_logits") else 1.0
    llama["embedding_scale"] = root if hub.get("input_emb_norm") else 1.0
    return llama | {"model_type": MODEL_TYPE}


_AROUND = {
    "embed_tokens.weight": "wte.weight",
    "norm.weight": "ln_f.weight",
    "lm_head.weight": "ff_out.weight",  # each block has an ff_out, too
}
_IN_BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "q_proj",
    "self_attn.k_proj": "k_proj",
    "self_attn.v_proj": "v_proj",
    "self_attn.o_proj": "attn_out",
    "post_attention_layernorm": "ff_norm",
    "mlp.gate_proj": "ff_proj",  # goes through SiLU
    "mlp.up_proj": "up_proj",
    "mlp.down_proj": "ff_out",
}


def renamed(part: HubTensor, hub: dict[str, Any], prefix: str) -> HubTensor:
    """A tensor of a Llama under LLaDA's name, with LLaDA's scales of embeddings and logits.
    `prefix`: of all names, "model." or ""."""
    name = part.name.removeprefix(prefix)
    if part.block is None:
        name = _AROUND[name]
    else:
        _, block, rest = name.split(".", 2)
        stem, kind = rest.rsplit(".", 1)
        name = f"blocks.{block}.{_IN_BLOCK[stem]}.{kind}"
    scales = {"embedding": hub["embedding_scale"], "logits": hub["logits_scale"]}
    scale = scales.get(part.path.split("/")[0], 1.0)
    return dataclasses.replace(part, name=f"{prefix}transformer.{name}", scale=scale)
