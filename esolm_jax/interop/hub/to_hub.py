"""A model of style "llama" → a folder of the Hugging Face hub, as Llama or Qwen.

`transformers`, vLLM and llama.cpp load it without our code. A model that came from a folder of the
hub and was not trained further goes back as it was: the type of its weights, tied embeddings,
config.json, generation_config.json, the tokenizer's files and the chat template.

An autoregressive model is written without the mask token. An Eso-LM at alpha_0 = 0 keeps it: the
logits of a text with [MASK] at its end are those of the next token.
"""

import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from esolm_jax import results
from esolm_jax.data.hub_tokenizer import HubTokenizer
from esolm_jax.errors import UserError
from esolm_jax.interop.hub import config as hub_config
from esolm_jax.interop.hub import from_hub, rope_scaling, shards, tokenizer_files
from esolm_jax.interop.hub import names as hub_names
from esolm_jax.interop.hub.names import HubTensor
from esolm_jax.interop.published import write as published_write
from esolm_jax.training import checkpoint_steps, restore

GENERATION = "generation_config.json"
# (qkv_bias, out_bias, qk_norm) → model_type, architecture
_LLAMA, _QWEN3 = ("llama", "LlamaForCausalLM"), ("qwen3", "Qwen3ForCausalLM")
_KINDS = {
    (False, False, False): _LLAMA,
    (True, True, False): _LLAMA,
    (True, False, False): ("qwen2", "Qwen2ForCausalLM"),
    (False, False, True): _QWEN3,
    (True, True, True): _QWEN3,
}


def convert(
    config,
    workdir: pathlib.Path,
    target: pathlib.Path,
    weights: str,
    step: str = checkpoint_steps.LATEST,
) -> tuple[int, int]:
    """Writes config.json, the weights and the tokenizer: all of it or nothing.

    Returns: the checkpoint's step and the number of parameters written.

    Raises:
      UserError: no checkpoint, a model without a counterpart on the hub, or the folder is not
        empty.
    """
    check_target(target)
    check(config)
    trained = published_write.load(config, workdir, weights, step)
    tokenizer = restore.load_tokenizer(workdir, trained.meta)  # verified before it is copied
    with results.new_folder(target) as draft:
        parameters = write(draft, config, trained, tokenizer)
    return trained.step, parameters


def check_target(target: pathlib.Path) -> None:
    """UserError unless the folder is new or empty, and its parent exists."""
    results.check_new_folder("--to", target)
    if not target.parent.is_dir():
        raise UserError(f"--to={target}: must be in a folder that exists; create {target.parent}")


def is_autoregressive(config) -> bool:
    """Whether the model is an `ar` model that the hub's Llama or Qwen can hold."""
    try:
        check(config)
    except UserError:
        return False
    return True


def check(config, *, or_masked: bool = False) -> None:
    """UserError, with the reason, if the hub has no such model.

    Args:
      or_masked: also allow an Eso-LM (B) at alpha_0 = 0, which keeps its mask token.
    """
    model, masked = config.model, or_masked and config.objective == "eso_b"
    allowed = {
        "objective": (config.objective, "eso_b" if masked else "ar"),
        "alpha_0": (config.alpha_0, 0.0),
        "model.style": (model.style, "llama"),
        "model.cond_width": (model.cond_width, 0),
        "model.max_positions": (model.max_positions, 0),
    }
    for name, (value, wanted) in allowed.items():
        if value != wanted:
            raise UserError(
                f"config.{name}={value!r}: must be {wanted!r} for a Llama or Qwen folder; use "
                "`export --to=hub` for other models, or `convert --to=FILE.safetensors` for one "
                "of style 'dit'"
            )
    kind = _KINDS.get((model.qkv_bias, model.out_bias, model.qk_norm))
    if kind is None or (model.mlp_bias and kind != _LLAMA):
        raise UserError(
            f"config.model.qkv_bias={model.qkv_bias}, out_bias={model.out_bias}, "
            f"mlp_bias={model.mlp_bias}, qk_norm={model.qk_norm}: no model of the hub has these; "
            "use `export --to=hub --layout=esolm`"
        )


def write(
    draft: pathlib.Path,
    config,
    trained: restore.TrainedModel,
    tokenizer: Any,
    shard_bytes: int = shards.SHARD_BYTES,
    dtype: str = "",
) -> int:
    """Writes all files to a folder that exists. Returns the number of parameters. UserError: the
    mask token is not the last id.

    Args:
      dtype: of the weights; "" = that of the folder that the model came from. float32 if the type
        does not hold all weights exactly.
    """
    with_mask = config.objective != "ar"
    if tokenizer.mask_id != tokenizer.vocab_size and not with_mask:
        raise UserError(
            f"--to={draft.name}: cannot be written, because the mask token (id "
            f"{tokenizer.mask_id}) is not the last id; `export --to=hub --layout=esolm` can"
        )
    ids = trained.built.model.vocab_size - (not with_mask)
    params = jax.tree.map(np.asarray, trained.params)
    source = _source_config(tokenizer)
    tied = bool(source) and hub_config.is_tied(source, hub_config.FILE) and _is_tied(params, ids)
    parts = hub_names.hub_tensors(trained.built.model, ids, tied=tied, prefix="model.")
    shapes = {part.name: part.shape for part in parts}
    read = _reader(params, parts)
    declared = dtype or source.get("dtype", source.get("torch_dtype"))
    dtype = shards.exact_dtype(str(declared).removeprefix("torch."), shapes, read)
    shards.write(draft, shapes, read, dtype, shard_bytes)
    made = _config_json(config, tokenizer, ids) | {"tie_word_embeddings": tied, "dtype": dtype}
    results.write_json(draft / hub_config.FILE, _updated(source, made) if source else made)
    _write_others(draft, tokenizer, with_mask=with_mask)
    return sum(int(np.prod(shape)) for shape in shapes.values())


def _source_config(tokenizer: Any) -> dict[str, Any]:
    """config.json of the folder that the model came from; {} if it came from none."""
    if not isinstance(tokenizer, HubTokenizer):
        return {}
    return json.loads(tokenizer.companions.get(hub_config.FILE, b"{}"))


def _updated(source: dict, made: dict) -> dict:
    """config.json of the source, changed where the model is another one."""
    length = max(source.get("max_position_embeddings") or 0, made["max_position_embeddings"])
    changed = {"max_position_embeddings": length, "vocab_size": made["vocab_size"]}
    if hub_config.is_tied(source, hub_config.FILE) != made["tie_word_embeddings"]:
        changed["tie_word_embeddings"] = made["tie_word_embeddings"]
    name = "torch_dtype" if "torch_dtype" in source else "dtype"
    return source | changed | {name: made["dtype"]}


def _is_tied(params: dict, ids: int) -> bool:
    embedding, head = params["embedding"]["embedding"], params["logits"]["kernel"]
    return np.array_equal(embedding[:ids], head[:, :ids].T)


def _reader(params: dict, parts: list[HubTensor]) -> Callable[[str], np.ndarray]:
    by_name = {part.name: part for part in parts}

    def read(name: str) -> np.ndarray:
        return by_name[name].get(from_hub.parameter(params, by_name[name].path))

    return read


def _write_others(draft: pathlib.Path, tokenizer: Any, *, with_mask: bool) -> None:
    """The tokenizer, and generation_config.json."""
    found = tokenizer_files.files(tokenizer, with_mask=with_mask)
    if isinstance(tokenizer, HubTokenizer) and GENERATION in tokenizer.companions:
        found[GENERATION] = tokenizer.companions[GENERATION]
    for name, content in found.items():
        (draft / name).write_bytes(content)
    if not isinstance(tokenizer, HubTokenizer) and not with_mask:
        folder = draft / tokenizer_files.OURS
        folder.mkdir()
        tokenizer.save(folder)
    if GENERATION not in found:
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        made = {name: getattr(tokenizer, name.replace("_token", "")) for name in names}
        results.write_json(draft / GENERATION, made)


def _config_json(config, tokenizer: Any, ids: int) -> dict:
    """config.json, with RoPE in the fields of old and of new versions of `transformers`."""
    model = config.model
    kind = _KINDS[model.qkv_bias, model.out_bias, model.qk_norm]
    rope, length = rope_scaling.to_hub(model), config.data.seq_len
    if "original_max_position_embeddings" in rope:
        length = max(length, int(model.rope_factor * model.rope_original_length))
    biases = {"attention_bias": model.out_bias} if kind in (_LLAMA, _QWEN3) else {}
    biases |= {"mlp_bias": model.mlp_bias} if kind == _LLAMA else {}
    return biases | {
        "model_type": kind[0],
        "architectures": [kind[1]],
        "vocab_size": ids,
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
        "rope_parameters": rope,
        "max_position_embeddings": length,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
    }
