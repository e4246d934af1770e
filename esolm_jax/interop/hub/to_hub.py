"""An autoregressive model of style "llama" → a folder of the Hugging Face hub, as Llama or Qwen.

`transformers` loads it with AutoModelForCausalLM.from_pretrained; the mask token is left out.
"""

import pathlib
import shutil

import jax
import numpy as np

from esolm_jax import results
from esolm_jax.errors import UserError
from esolm_jax.interop import safetensors_file
from esolm_jax.interop.hub import config as hub_config
from esolm_jax.interop.hub import folder as hub_folder
from esolm_jax.interop.hub import names as hub_names
from esolm_jax.interop.published import write as published_write
from esolm_jax.training import checkpoint_steps, restore

# (qkv_bias, qk_norm) → model_type, architecture
_KINDS = {
    (False, False): ("llama", "LlamaForCausalLM"),
    (True, False): ("qwen2", "Qwen2ForCausalLM"),
    (False, True): ("qwen3", "Qwen3ForCausalLM"),
}


def convert(
    config,
    workdir: pathlib.Path,
    target: pathlib.Path,
    weights: str,
    step: str = checkpoint_steps.LATEST,
) -> tuple[int, int]:
    """Writes config.json, model.safetensors and the tokenizer: all of it or nothing.

    Returns: the checkpoint's step and the number of parameters written.

    Raises:
      UserError: no checkpoint, a model without a counterpart on the hub, or the folder is not
        empty.
    """
    results.check_new_folder("--to", target)
    if not target.parent.is_dir():
        raise UserError(f"--to={target}: must be in a folder that exists; create {target.parent}")
    kind = _kind(config)
    trained = published_write.load(config, workdir, weights, step)
    restore.load_tokenizer(workdir, trained.meta)  # verified before it is copied
    tokenizer = trained.meta["tokenizer"]
    if tokenizer["mask_id"] != tokenizer["vocab_size"]:
        raise UserError(
            f"--to={target}: cannot be written, because the mask token (id {tokenizer['mask_id']}) "
            "is not the last id"
        )
    ids = tokenizer["vocab_size"]
    parts = hub_names.hub_tensors(trained.built.model, ids, tied=False, prefix="model.")
    params = jax.tree.map(np.asarray, trained.params)
    tensors = {part.name: part.get(_at(params, part.path)) for part in parts}
    with results.new_folder(target) as draft:
        results.write_json(draft / hub_config.FILE, _config_json(config, tokenizer, kind))
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        safetensors_file.write(draft / hub_folder.FILE, shapes, tensors.items(), {})
        shutil.copytree(workdir / "tokenizer", draft, dirs_exist_ok=True)
    return trained.step, sum(tensor.size for tensor in tensors.values())


def _kind(config) -> tuple[str, str]:
    """The kind of the model on the hub. UserError: the hub has no such model."""
    model = config.model
    allowed = {
        "objective": (config.objective, "ar"),
        "model.style": (model.style, "llama"),
        "model.cond_width": (model.cond_width, 0),
        "model.max_positions": (model.max_positions, 0),
    }
    for name, (value, wanted) in allowed.items():
        if value != wanted:
            raise UserError(
                f"config.{name}={value!r}: must be {wanted!r} with --to=FOLDER/; use "
                "--to=FILE.safetensors for a model of style 'dit'"
            )
    if (model.qkv_bias, model.qk_norm) not in _KINDS:
        raise UserError(
            "config.model.qk_norm=True: must be False with model.qkv_bias, because no model of "
            "the hub has both"
        )
    return _KINDS[model.qkv_bias, model.qk_norm]


def _at(tree: dict, path: str):
    for key in path.split("/"):
        tree = tree[key]
    return tree


def _config_json(config, tokenizer: dict, kind: tuple[str, str]) -> dict:
    """config.json, with RoPE in the fields of old and of new versions of `transformers`."""
    model = config.model
    rope = {"rope_type": "default"}
    if model.rope_factor != 1:
        rope = {
            "rope_type": "llama3",
            "factor": model.rope_factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": model.rope_original_length,
        }
    return {
        "model_type": kind[0],
        "architectures": [kind[1]],
        "vocab_size": tokenizer["vocab_size"],
        "hidden_size": model.width,
        "num_hidden_layers": model.blocks,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads or model.heads,
        "head_dim": (model.attention_width or model.width) // model.heads,
        "intermediate_size": model.mlp_width or 4 * model.width,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_base,
        "rope_scaling": None if model.rope_factor == 1 else rope,
        "rope_parameters": {"rope_theta": model.rope_base, **rope},
        "max_position_embeddings": config.data.seq_len,
        "tie_word_embeddings": False,
        "bos_token_id": tokenizer["bos_id"],
        "eos_token_id": tokenizer["eos_id"],
        "pad_token_id": tokenizer["pad_id"],
        "dtype": "float32",
    }
