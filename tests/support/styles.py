"""A tiny model of each style, with random weights."""

import dataclasses
import functools
import zlib

import jax
import numpy as np

from esolm_jax.model import transformer as model
from esolm_jax.model.model_config import ModelConfig

VOCAB, LENGTH = 12, 8
LLAMA = ModelConfig(
    vocab_size=VOCAB,
    width=16,
    blocks=2,
    heads=4,
    kv_heads=2,
    mlp_width=24,
    cond_width=0,
    style="llama",
    rope_base=500.0,
    attention="dense",
)
DIT = ModelConfig(vocab_size=VOCAB, width=16, blocks=2, heads=2, cond_width=4, attention="dense")

GPT2 = ModelConfig(
    vocab_size=VOCAB, width=16, blocks=2, heads=4, cond_width=0, style="gpt2", qkv_bias=True,
    max_positions=16,
)  # fmt: skip
QWEN = dataclasses.replace(LLAMA, attention_width=32, qkv_bias=True, qk_norm=True)


@functools.cache
def params_of(config):
    """Random, zero-initialised parts too; the same for configs of the same sizes."""

    def draw(path, leaf):
        name = jax.tree_util.keystr(path)
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        noise = rng.normal(size=leaf.shape).astype(np.float32)
        return 1 + 0.3 * noise if "norm" in name else 0.3 * noise

    return jax.tree.map_with_path(
        draw, jax.eval_shape(lambda: model.init(config, jax.random.key(0)))
    )
