"""Variants of config.json of the Hugging Face hub, and weights that follow from names and shapes.

`fixtures/make_hub_variants.py` computes their logits with `transformers`.
"""

import zlib

import numpy as np

IDS, LENGTH = 64, 24
_BASE = {
    "vocab_size": IDS,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "bos_token_id": 59,
    "eos_token_id": 59,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
}


def _rope(kind: str, **fields) -> dict:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 500.0, **fields}}


_LLAMA3 = {"factor": 4.0, "original_max_position_embeddings": 16}
_YARN = {"factor": 4.0, "original_max_position_embeddings": 16}
_OLD = {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
_GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "n_inner": 20}

# name → config.json
SUPPORTED = {
    "llama": {"model_type": "llama"},
    "llama_attention_bias": {"model_type": "llama", "attention_bias": True},
    "llama_mlp_bias": {"model_type": "llama", "mlp_bias": True},
    "llama_all_biases_tied": {
        "model_type": "llama",
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
    },
    "llama_wide_heads": {"model_type": "llama", "head_dim": 12},
    "llama_all_key_heads": {"model_type": "llama", "num_key_value_heads": 2},
    "llama_linear": {"model_type": "llama", **_rope("linear", factor=4.0)},
    "llama_linear_old": {"model_type": "llama", **_OLD},
    "llama_llama3": {
        "model_type": "llama",
        **_rope("llama3", **_LLAMA3, low_freq_factor=1.0, high_freq_factor=4.0),
    },
    "llama_llama3_factors": {
        "model_type": "llama",
        **_rope("llama3", **_LLAMA3, low_freq_factor=0.5, high_freq_factor=2.0),
    },
    "llama_yarn": {"model_type": "llama", "head_dim": 16, **_rope("yarn", **_YARN)},
    "llama_yarn_bounds": {
        "model_type": "llama",
        "head_dim": 16,
        **_rope("yarn", **_YARN, beta_fast=2.0, beta_slow=0.5, attention_factor=1.3),
    },
    "llama_yarn_mscale": {
        "model_type": "llama",
        "head_dim": 16,
        **_rope("yarn", **_YARN, mscale=1.0, mscale_all_dim=0.5),
    },
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "mistral_wide_window": {"model_type": "mistral", "sliding_window": 64, "head_dim": 12},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2_yarn": {"model_type": "qwen2", "num_key_value_heads": 2, **_rope("yarn", **_YARN)},
    "qwen3": {"model_type": "qwen3", "head_dim": 8},
    "qwen3_attention_bias": {"model_type": "qwen3", "head_dim": 8, "attention_bias": True},
    "qwen3_yarn": {"model_type": "qwen3", "head_dim": 16, **_rope("yarn", **_YARN)},
    "gpt2": {"model_type": "gpt2", "activation_function": "gelu_new", **_GPT2},
}
# name → (config.json, part of the message)
REFUSED = {
    "dynamic": ({"model_type": "llama", **_rope("dynamic", factor=2.0)}, "rope scaling 'dynamic'"),
    "longrope": (
        {"model_type": "llama", **_rope("longrope", factor=2.0)},
        "rope scaling 'longrope'",
    ),
    "yarn_truncate": (
        {"model_type": "llama", **_rope("yarn", **_YARN, truncate=False)},
        "'yarn' with truncate=False",
    ),
    "llama3_bounds": (
        {
            "model_type": "llama",
            **_rope("llama3", **_LLAMA3, low_freq_factor=4.0, high_freq_factor=4.0),
        },
        "low_freq_factor=4: must be below high_freq_factor",
    ),
    "partial_rotation": (
        {"model_type": "llama", **_rope("default", partial_rotary_factor=0.5)},
        "partial_rotary_factor=0.5",
    ),
    "mistral_window": ({"model_type": "mistral", "sliding_window": 8}, "sliding_window=8"),
    "mistral_default_window": (
        {"model_type": "mistral", "max_position_embeddings": 32768},
        "sliding_window=4096",
    ),
    "qwen2_window": ({"model_type": "qwen2", "use_sliding_window": True}, "use_sliding_window"),
    "gelu": ({"model_type": "llama", "hidden_act": "gelu"}, "hidden_act='gelu'"),
    "quantized": (
        {"model_type": "llama", "quantization_config": {"quant_method": "gptq"}},
        "quantization_config",
    ),
    "gemma": ({"model_type": "gemma2"}, "model_type='gemma2'"),
}


def config_json(fields: dict) -> dict:
    """The whole config.json of a variant."""
    return _BASE | fields


def tokens() -> np.ndarray:
    """int64 [1, LENGTH]."""
    return np.random.default_rng(7).integers(0, IDS, (1, LENGTH))


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Float32: around 1 for norms, around 0 else."""
    noise = np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape)
    is_norm = len(shape) == 1 and not name.endswith("bias")
    return ((1 if is_norm else 0) + 0.3 * noise).astype(np.float32)
