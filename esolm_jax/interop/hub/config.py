"""config.json of a GPT-2, Llama, Mistral, Qwen, LLaDA, Dream or SDAR of the Hugging Face hub, as a
config file: interop/hub/config.py:FOLDER.

`convert` uses it when --config is left out. The first three are `ar` models, the others diffusion
models: see _DIFFUSION.
"""

import os
import pathlib
from typing import Any

from ml_collections import ConfigDict

from esolm_jax import config as config_lib
from esolm_jax.errors import UserError
from esolm_jax.files import regular_file
from esolm_jax.interop.hub import llada, rope_scaling
from esolm_jax.interop.shown import shown

FILE = "config.json"
_SIZE = 16 * regular_file.MB
_LENGTH = 1024  # data.seq_len, if the model supports it
_MOST, _MOST_FLOAT = 2**31 - 1, 3e38  # numbers fit 32 bits

# ours → theirs, and the default of `transformers` (None = required).
_GPT2 = {
    "width": ("n_embd", None),
    "blocks": ("n_layer", None),
    "heads": ("n_head", None),
    "mlp_width": ("n_inner", 0),
    "max_positions": ("n_positions", None),
    "norm_eps": ("layer_norm_epsilon", 1e-5),
}
_LLAMA = {
    "width": ("hidden_size", None),
    "blocks": ("num_hidden_layers", None),
    "heads": ("num_attention_heads", None),
    "kv_heads": ("num_key_value_heads", 0),
    "mlp_width": ("intermediate_size", None),
    "norm_eps": ("rms_norm_eps", 1e-6),
}
_MISTRAL = _LLAMA | {"kv_heads": ("num_key_value_heads", 8)}
_QWEN = _LLAMA | {"kv_heads": ("num_key_value_heads", 32)}
# Null is not "missing": it means one key/value head per head, and an MLP of 4 x the width.
_NULL = {"num_key_value_heads": 0, "n_inner": 0}
_TANH = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")
_SILU = ("silu", "swish")

# model_type → (fields, our fixed fields, their field → (supported values, default)).
# Null is supported if `transformers` treats it as False or as 1.
_OFF = ((False, None), False)
_BOTH = ((False, None, True), False)
_ROPE = {
    "use_sliding_window": _OFF,
    "hidden_act": (_SILU, "silu"),
    "partial_rotary_factor": ((1, None), 1),
}
_FAMILIES: dict[str, tuple[dict, dict, dict]] = {
    "gpt2": (
        _GPT2,
        {"style": "gpt2", "qkv_bias": True},
        {
            "activation_function": (_TANH, "gelu_new"),
            "scale_attn_weights": ((True,), True),
            "scale_attn_by_inverse_layer_idx": _OFF,
            "add_cross_attention": _OFF,
        },
    ),
    "llama": (
        _LLAMA,
        {"style": "llama"},
        _ROPE | {"attention_bias": _BOTH, "mlp_bias": _BOTH},
    ),
    "qwen2": (_QWEN, {"style": "llama", "qkv_bias": True}, _ROPE),
    "qwen3": (
        _QWEN,
        {"style": "llama", "qk_norm": True},
        _ROPE | {"attention_bias": _BOTH},
    ),
    "mistral": (_MISTRAL, {"style": "llama"}, _ROPE),
}
_FAMILIES |= {  # diffusion models with the blocks of other families
    llada.MODEL_TYPE: (_LLAMA, {"style": "llama"}, {}),
    "Dream": _FAMILIES["qwen2"],
    "sdar": _FAMILIES["qwen3"],
}
# model_type → fields of the config, of models that are not autoregressive.
_DIFFUSION: dict[str, dict[str, Any]] = {
    llada.MODEL_TYPE: {"objective": "mdlm", "sample.loop": "llada", "sample.temperature": 0.0},
    "Dream": {"objective": "mdlm_shifted", "sample.loop": "dream", "sample.temperature": 0.0},
    "sdar": {"objective": "bd3", "sample.loop": "sdar"},
}
_TIED = {"gpt2": True}  # tie_word_embeddings by default
_HEAD_WIDTH = {"qwen3": 128, "sdar": 128}  # head_dim by default; of the others hidden_size / heads
_WINDOW = {"mistral": 4096}  # sliding_window by default
_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


def is_folder(path: str) -> bool:
    """Whether `path` is a folder, as for models of the hub; published checkpoints are files."""
    return os.path.isdir(regular_file.expand(path))


def read(folder: pathlib.Path) -> dict[str, Any]:
    """The content of config.json, of LLaDA in the names of Llama. UserError: missing, not JSON, or
    of an unsupported family."""
    path = folder / FILE
    if not regular_file.is_there(path):
        raise UserError(
            f"--from={folder}: is a folder without {FILE}; give a folder of the Hugging Face hub "
            "(config.json, *.safetensors, tokenizer.json) or a file of published weights"
        )
    hub = regular_file.read_json(path, _SIZE)
    kind = hub.get("model_type") if isinstance(hub, dict) else None
    if not isinstance(kind, str) or kind not in _FAMILIES:
        raise UserError(
            f"{path}: model_type={shown(kind)}: an unsupported architecture; must be one of "
            f"{', '.join(_FAMILIES)}"
        )
    return llada.as_llama(hub, str(path)) if kind == llada.MODEL_TYPE else hub


def is_tied(hub: dict[str, Any], where: str) -> bool:
    """Whether embedding and head are tied. UserError: the field is not a boolean."""
    tied = hub.get("tie_word_embeddings", _TIED.get(hub["model_type"], False))
    if tied is not None and not isinstance(tied, bool):
        raise UserError(f"{where}: tie_word_embeddings={shown(tied)}: must be true or false")
    return bool(tied)  # null is False, as in `transformers`


def special_ids(hub: dict[str, Any], where: str) -> dict[str, int]:
    """Ids of BOS, EOS and PAD. Missing BOS and PAD are replaced by other ids: an AR text may begin
    with EOS, and PAD is unused. UserError: EOS is missing, or an id is not a number."""
    ids = {}
    for name in _SPECIAL:
        value = hub.get(name)
        value = value[0] if isinstance(value, list) and value else value
        if value is not None and (type(value) is not int or not -1 <= value <= _MOST):
            raise UserError(f"{where}: {name}={shown(value)}: must be a token id")
        ids[name.removesuffix("_token_id")] = None if value == -1 else value
    if ids["eos"] is None:
        raise UserError(
            f"{where}: eos_token_id is missing; must be set because EOS joins documents"
        )
    return {name: ids["eos"] if i is None else i for name, i in ids.items()}


def mask_id(hub: dict[str, Any], ids: int, where: str) -> int | None:
    """The mask token's id, or None if config.json has none. UserError: not one of the `ids`."""
    value = hub.get("mask_token_id")
    if value is not None and (type(value) is not int or not 0 <= value < ids):
        raise UserError(f"{where}: mask_token_id={shown(value)}: must be a token id below {ids}")
    return value


def is_diffusion(hub: dict[str, Any]) -> bool:
    """Whether the model predicts masks rather than the next token."""
    return hub["model_type"] in _DIFFUSION


def get_config(path: str) -> ConfigDict:
    """ConfigDict of the model in a folder.

    Raises:
      UserError: the architecture is unsupported; the message names the parts.
    """
    folder = regular_file.expand(path)
    hub = read(folder)
    fields, fixed, allowed = _FAMILIES[hub["model_type"]]
    where = str(folder / FILE)
    _check(hub, allowed, where)
    config = config_lib.default_config()
    with config.unlocked():
        config.objective, config.alpha_0 = "ar", 0.0
        model = config.model
        model.cond_width, model.dropout = 0, 0.0
        for name, value in fixed.items():
            model[name] = value
        for name, (theirs, default) in fields.items():
            model[name] = _number(hub, theirs, default, type(model[name]), where)
        if hub["model_type"] != "gpt2":
            _set_heads(model, hub, where)
            model.update(rope_scaling.fields(hub, where))
            _set_biases(model, hub)
            _check_window(hub, where)
        config.data.source = "text"
        config.data.tokenizer = "tokenizers"
        longest = _number(hub, "max_position_embeddings", _LENGTH, int, where)
        config.data.seq_len = min(_LENGTH, model.max_positions or longest)
        if hub["model_type"] in _DIFFUSION:
            _set_diffusion(config, hub, where)
    return config


def _set_diffusion(config: ConfigDict, hub: dict, where: str) -> None:
    config.alpha_0 = 1.0
    config.update_from_flattened_dict(_DIFFUSION[hub["model_type"]])
    if "block_size" in hub:
        block = _number(hub, "block_size", None, int, where)
        config.block_length = block
        config.data.seq_len = max(block, config.data.seq_len // block * block)


def _number(hub: dict, name: str, default, kind: type, where: str):
    """A positive number. `default`: for a missing or null field; None: the field is required."""
    default = _NULL.get(name, default) if name in hub else default
    value = hub.get(name)
    if value is None and default is None:
        raise UserError(f"{where}: {name} is missing")
    if value is None:
        return kind(default)
    most = _MOST if kind is int else _MOST_FLOAT
    if type(value) not in (int, kind) or not 0 < value <= most:
        raise UserError(f"{where}: {name}={shown(value)}: must be a positive {kind.__name__}")
    return kind(value)


def _check(hub: dict, allowed: dict, where: str) -> None:
    """UserError that lists every unsupported part."""
    wrong = [
        f"{name}={shown(hub[name])} (allowed: {', '.join(str(v) for v in values if v is not None)})"
        for name, (values, default) in allowed.items()
        if hub.get(name, default) not in values
    ]
    layers = hub.get("layer_types")
    if layers is not None and not isinstance(layers, list):
        wrong.append(f"layer_types={shown(layers)} (allowed: a list of full_attention)")
    elif other := [layer for layer in layers or [] if layer != "full_attention"]:
        wrong.append(f"layer_types={shown(other[0])} (allowed: full_attention)")
    if hub.get("quantization_config") is not None:
        wrong.append("quantization_config (allowed: none; take the weights before quantization)")
    if wrong:
        raise UserError(f"{where}: an unsupported architecture: {'; '.join(wrong)}")


def _set_heads(model: ConfigDict, hub: dict, where: str) -> None:
    default = _HEAD_WIDTH.get(hub["model_type"], 0)
    width = _number(hub, "head_dim", default, int, where) * model.heads
    model.attention_width = 0 if width == model.width else width
    model.kv_heads = 0 if model.kv_heads == model.heads else model.kv_heads


def _set_biases(model: ConfigDict, hub: dict) -> None:
    """Llama and Qwen 3: biases of the attention's four products, and of the MLP."""
    if hub.get("attention_bias"):
        model.qkv_bias = model.out_bias = True
    model.mlp_bias = bool(hub.get("mlp_bias"))


def _check_window(hub: dict, where: str) -> None:
    """UserError if texts may be longer than the window of attention."""
    if hub["model_type"] not in _WINDOW:
        return
    window = hub.get("sliding_window", _WINDOW[hub["model_type"]])
    longest = _number(hub, "max_position_embeddings", 2**17, int, where)
    if window is not None and (type(window) is not int or window < longest):
        raise UserError(
            f"{where}: an unsupported architecture: sliding_window={shown(window)} (allowed: null, "
            f"or at least max_position_embeddings={longest})"
        )
