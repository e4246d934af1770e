"""A workdir → a folder that `transformers` opens: `export --to=hub`.

An autoregressive model of style "llama" becomes a Llama or Qwen (interop/hub/to_hub.py). Every
other model goes with its own PyTorch code (remote_code/), and with logits and texts of ours in
expected.npz, which check_esolm.py compares.
"""

import dataclasses
import importlib.resources
import pathlib
from typing import Any

import numpy as np

from esolm_jax import results
from esolm_jax.family import registry
from esolm_jax.interop.export import hub_card, parity, plain, rounding, sampling_plan
from esolm_jax.interop.hub import (
    esolm_names,
    from_esolm,
    from_hub,
    shards,
    to_hub,
    tokenizer_files,
)
from esolm_jax.interop.published import write as published_write
from esolm_jax.model import rope
from esolm_jax.sampling import generate
from esolm_jax.sampling.engine import network as network_lib
from esolm_jax.sampling.plan.canvas import Canvas
from esolm_jax.training import checkpoint_steps, restore

LAYOUTS = ("auto", "esolm", "plain")
_CLASS = "modeling_esolm.EsoLMForMaskedLM"
_CODE = {
    "configuration_esolm.py": "remote_code",
    "modeling_esolm.py": "remote_code",
    "generation_esolm.py": "remote_code",
    "schedule_esolm.py": "shipped",
    "check_esolm.py": "remote_code",
}
_TOKENS = 64  # at most, of a text in expected.npz
_LOGITS = 2**22  # numbers at most, of the logits in expected.npz
_SAMPLED = {"greedy": 0.0, "drawn": 1.0}  # arrays of texts in expected.npz → temperature


@dataclasses.dataclass(frozen=True)
class Wanted:
    """The requested folder.

    Attributes:
      weights: "ema" or "raw". step: a number, "best" or "latest".
      layout: "plain" = Llama or Qwen; "esolm" = with our PyTorch code; "auto" = plain for
        autoregressive models of style "llama".
      shard_bytes: the largest size of a file with weights.
      dtype: "bfloat16", "float16" or "float32"; "" = float32, or, with layout plain, that of the
        folder that the model came from, if it holds all weights.
    """

    weights: str = "ema"
    step: str = checkpoint_steps.LATEST
    layout: str = "auto"
    shard_bytes: int = shards.SHARD_BYTES
    dtype: str = ""


@dataclasses.dataclass(frozen=True)
class Written:
    """What was written: the layout, the checkpoint's step, the number of parameters, and what
    rounding changed (of rounding.figures; {} if nothing)."""

    layout: str
    step: int
    parameters: int
    rounding: dict[str, float]


def export(config, workdir: pathlib.Path, target: pathlib.Path, wanted: Wanted) -> Written:
    """Writes `target`, which must be new or empty: all of it, or nothing.

    Raises:
      UserError: no checkpoint, a tokenizer of another model, or a model that the layout cannot
        hold.
    """
    to_hub.check_target(target)
    is_plain = wanted.layout == "plain"
    is_plain |= wanted.layout == "auto" and to_hub.is_autoregressive(config)
    if is_plain:
        to_hub.check(config, or_masked=True)
    trained = published_write.load(config, workdir, wanted.weights, wanted.step)
    tokenizer, changed = restore.load_tokenizer(workdir, trained.meta), {}
    if wanted.dtype in rounding.DTYPES:
        unfiltered = _short(config, temperature=1.0)
        with unfiltered.unlocked():
            unfiltered.sample.update({"top_k": 0, "top_p": 1.0})
        changed = rounding.rounded(unfiltered, trained, wanted.dtype)
    with results.new_folder(target) as draft:
        if is_plain:
            sizes = wanted.shard_bytes, wanted.dtype
            parameters = to_hub.write(draft, config, trained, tokenizer, *sizes)
        else:
            parameters = _write(draft, config, trained, tokenizer, wanted)
        layout = "plain" if is_plain else "esolm"
        written = Written(layout, trained.step, parameters, changed)
        card = hub_card.text(config, workdir, written, wanted.weights)
        (draft / hub_card.FILE).write_text(card, encoding="utf-8")
    return written


def _write(draft: pathlib.Path, config, trained, tokenizer: Any, wanted: Wanted) -> int:
    """All files of the layout "esolm" but the model card. Returns the number of parameters."""
    plain.check(trained.built.model)
    parts = {part.name: part for part in esolm_names.tensors(trained.built.model)}
    shapes = {name: part.shape for name, part in parts.items()}

    def read(name: str) -> np.ndarray:
        array = from_hub.parameter(trained.params, parts[name].path)
        return parts[name].get(np.asarray(array))

    np.savez(draft / "expected.npz", **_expected(config, trained))
    dtype = wanted.dtype or "float32"
    shards.write(draft, shapes, read, dtype, wanted.shard_bytes)
    about = published_write.about(trained, wanted.weights)
    made = _config_json(config, trained, tokenizer) | {"dtype": dtype, "esolm": about}
    results.write_json(draft / "config.json", made)
    for name, content in tokenizer_files.files(tokenizer, with_mask=True).items():
        (draft / name).write_bytes(content)
    (draft / tokenizer_files.OURS).mkdir()
    tokenizer.save(draft / tokenizer_files.OURS)
    for name, part in _CODE.items():
        code = importlib.resources.files(f"esolm_jax.interop.export.{part}")
        (draft / name).write_bytes((code / name).read_bytes())
    return sum(int(np.prod(shape)) for shape in shapes.values())


def _config_json(config, trained: restore.TrainedModel, tokenizer: Any) -> dict:
    """config.json: the fields of EsoLMConfig (configuration_esolm.py)."""
    model, special = trained.built.model, trained.built.special
    frequencies = [] if model.max_positions else np.asarray(rope.rope_frequencies(model)).tolist()
    return {
        "model_type": from_esolm.MODEL_TYPE,
        "architectures": [_CLASS.split(".")[1]],
        "auto_map": {
            "AutoConfig": "configuration_esolm.EsoLMConfig",
            **dict.fromkeys(("AutoModel", "AutoModelForMaskedLM", "AutoModelForCausalLM"), _CLASS),
        },
        "vocab_size": model.vocab_size,
        "hidden_size": model.width,
        "num_hidden_layers": model.blocks,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.groups,
        "head_dim": model.head_width,
        "intermediate_size": model.inner,
        "max_position_embeddings": model.max_positions or config.data.seq_len,
        "style": model.style,
        "cond_width": model.cond_width,
        "norm_eps": model.norm_eps,
        "qkv_bias": model.qkv_bias,
        "out_bias": model.out_bias,
        "mlp_bias": model.mlp_bias,
        "qk_norm": model.qk_norm,
        "max_positions": model.max_positions,
        "rope_frequencies": frequencies,
        "score_scale": model.score_scale,
        "mask_token_id": special.mask,
        "start_token_id": special.start,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
        "tie_word_embeddings": False,
        "sampling": sampling_plan.of_config(config),
    }


def _expected(config, trained: restore.TrainedModel) -> dict[str, np.ndarray]:
    """Labelled tokens with their logits, and texts of two rows by greedy and by drawn tokens."""
    model, special = trained.built.model, trained.built.special
    tokens = parity.examples(model, config.data.seq_len)[:1]
    few = max(1, _LOGITS // model.vocab_size)
    labels = parity.labels(tokens[0])
    names = ("token", "position", "rank", "in_context")
    arrays = dict(zip(names, labels, strict=True))
    arrays["logits"] = parity.trained_logits(model, trained.params, tokens)[0][:, :few]
    arrays["seed"] = np.int64(config.sample.seed)
    network = network_lib.fold(plain.in_float32(model), trained.params)
    for name, temperature in _SAMPLED.items():
        short = _short(config, temperature)
        canvas = Canvas.empty(2, short.sample.length, short.sample.seed)
        generator = generate.Generator.of(short, canvas, special)
        arrays[name] = np.asarray(generator.run(network).text)
    return arrays


def _short(config, temperature: float):
    """The config, for short texts by the plain loop."""
    length = config.sample.length or config.data.seq_len
    block = config.block_length if registry.get(config.objective).is_blockwise else 1
    short = config.copy_and_resolve_references()
    with short.unlocked():
        short.sample.update(
            {
                "length": min(length, max(block, _TOKENS - _TOKENS % block)),
                "temperature": temperature,
                **parity.PLAIN,
            }
        )
    return short
