"""A workdir with a checkpoint of random weights."""

import pathlib

import jax
import numpy as np
import tiny_run

import esolm_jax
from esolm_jax.data.manifest import tokenizer_entry
from esolm_jax.data.tokenizer import Bytes
from esolm_jax.interop.published import read as published_read
from esolm_jax.model import build
from esolm_jax.model import transformer as model_lib
from esolm_jax.parallel import sharding
from esolm_jax.training import optimizer, train_state

LENGTH, VOCAB = 12, 260
ADALN = {"model.cond_width": 8, "model.blocks": 2}
LLAMA = {"style": "llama", "kv_heads": 1, "blocks": 2, "mlp_width": 24}
PRETRAINED = {  # as they come from the hub, and what training makes of them
    "gpt2": {"style": "gpt2", "max_positions": 14, "qkv_bias": True, "blocks": 2, "norm_eps": 0.01},
    "llama3": LLAMA | {"rope_base": 500.0, "rope_factor": 4.0, "rope_original_length": 16},
    "qwen3": LLAMA
    | {"heads": 4, "kv_heads": 2, "attention_width": 24, "qk_norm": True}
    | {"cond_width": 8},
}
PRETRAINED = {
    name: {f"model.{field}": value for field, value in fields.items()}
    for name, fields in PRETRAINED.items()
}


def make_run(workdir: pathlib.Path, mesh=None, **fields) -> pathlib.Path:
    """A workdir with a checkpoint of random weights, the EMA other ones than the raw."""
    fields = {"data.seq_len": LENGTH, "data.source": "shakespeare"} | fields
    config, tokenizer = tiny_run.make_config(fields), Bytes()
    model = build.model_config(config, tokenizer_entry(tokenizer), "cpu")

    def draw(seed):
        like = jax.eval_shape(lambda: model_lib.init(model, jax.random.key(0)))
        rng = np.random.default_rng(seed)

        def leaf(path, like):
            noise = 0.3 * rng.normal(size=like.shape).astype(np.float32)
            return noise + ("norm" in jax.tree_util.keystr(path))

        params = jax.tree.map_with_path(leaf, like)
        return params if mesh is None else jax.device_put(params, sharding.parameters(mesh, params))

    state = train_state.init_state(draw(0), optimizer.make(config), jax.random.key(0))
    state = state.replace(ema=draw(1), step=jax.numpy.int32(7))
    meta = {"config": config.to_dict(), "cursor": 0, "tokenizer": tokenizer_entry(tokenizer)}
    meta["version"] = esolm_jax.__version__
    published_read.write_workdir(workdir, meta, tokenizer, lambda kept, _: kept.save(state, meta))
    return workdir
