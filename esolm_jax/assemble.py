"""What train, evaluate and sample build alike from a config: sizes, special ids, placement."""

import dataclasses
import pathlib
from collections.abc import Callable

import jax
from ml_collections import ConfigDict

from esolm_jax import attention, checkpoint, prng, sharding
from esolm_jax import config as config_lib
from esolm_jax import model as model_lib
from esolm_jax.data import reader
from esolm_jax.data.manifest import Manifest, check, load_manifest, open_tokenizer
from esolm_jax.data.tokenizer import Bytes
from esolm_jax.errors import UserError
from esolm_jax.finite import check_finite
from esolm_jax.loss import Head
from esolm_jax.objectives import Special


def data_dir(config, workdir: pathlib.Path) -> pathlib.Path:
    """Where the prepared data of a run lie."""
    return pathlib.Path(config.data.dir).expanduser() if config.data.dir else workdir / "data"


def load_data(config, workdir: pathlib.Path) -> Manifest:
    """The run's manifest; UserError if the data are missing or not what config.data says."""
    manifest = load_manifest(data_dir(config, workdir))
    check(manifest, config)
    return manifest


_SIZES = "width blocks heads cond_width style kv_heads mlp_width attention_width norm_eps".split()
_SIZES += "qkv_bias qk_norm positions rope_base rope_factor rope_length".split()
# What weights were trained with, and can be used with alone.
MODEL_FIELDS = ("objective", "start_token", *(f"model.{name}" for name in _SIZES))


def model_config(config, tokenizer: dict, platform: str) -> model_lib.ModelConfig:
    """Sizes of the model: config.model and the tokenizer's vocabulary with the mask token.
    `platform` ("cpu", "gpu", "tpu") chooses the attention if the config leaves it open."""
    m = config.model
    return model_lib.ModelConfig(
        vocab_size=num_ids(tokenizer),
        dropout=m.dropout,
        dtype=m.dtype,
        unroll=m.unroll,
        attention=attention.resolve(m.attention, platform, config.data.seq_len),
        remat=m.remat,
        **{name: m[name] for name in _SIZES},
    )


def planned_tokenizer(config) -> dict:
    """What `prepare` would write of the tokenizer that config.data asks for, as far as a model
    needs to know; of a SentencePiece file, its size is taken to be data.vocab_size."""
    published = {"bert": (30522, 103, 101), "gpt2": (50257, 50257, 50256)}
    size = Bytes.vocab_size if config.data.tokenizer == "bytes" else config.data.vocab_size
    entry = published.get(config.data.tokenizer, (size, size, 0))
    return dict(zip(("vocab_size", "mask_id", "bos_id"), entry, strict=True))


def num_ids(tokenizer: dict) -> int:
    """How many ids a model has logits for: the tokenizer's, and the mask's if it is not of them."""
    return max(tokenizer["vocab_size"], tokenizer["mask_id"] + 1)


@dataclasses.dataclass(frozen=True)
class Built:
    """A model on a mesh, and what a loss needs beside it."""

    mesh: jax.sharding.Mesh
    model: model_lib.ModelConfig
    apply: Callable
    head: Head
    special: Special


def build(config, tokenizer: dict, mesh) -> Built:
    """The model of `config` with the vocabulary of `tokenizer` (as in a manifest).

    Raises:
      UserError: something does not divide by the mesh; the attention is for other devices.
    """
    config_lib.validate_mesh(config, mesh.shape)
    platform = sharding.platform(mesh)
    model = model_config(config, tokenizer, platform)
    if attention.ON.get(model.attention, platform) != platform:
        raise UserError(
            f"config.model.attention={model.attention!r}: "
            f"is for {attention.ON[model.attention].upper()}s, but these are {platform.upper()}s"
        )
    start = tokenizer["mask_id" if config.start_token == "mask" else "bos_id"]
    special = Special(mask=tokenizer["mask_id"], start=start)
    head = Head.of(model, special.mask, mesh, chunk=config.model.loss_chunk)
    return Built(mesh, model, model_lib.bind(model, mesh), head, special)


def eval_batches(config, manifest: Manifest, split: str, max_windows: int, mesh):
    """Global batches of config.eval.batch_size windows of a split, each window once."""
    size = config.eval.batch_size
    mine = sharding.local_rows(mesh, size)
    for batch in reader.eval_batches(
        manifest, split, batch_size=size, max_windows=max_windows, rows=mine
    ):
        yield sharding.put_batch(batch, mesh, size)


def abstract_params(config: model_lib.ModelConfig, mesh):
    """ShapeDtypeStructs of the parameters, placed on the mesh."""

    def make():
        return model_lib.init(config, prng.key(0))

    return sharding.abstract(make, sharding.parameters(mesh, jax.eval_shape(make)))


def check_same_fields(config, meta: dict, is_fixed, or_else: str = "another --workdir") -> None:
    """UserError if a field for which `is_fixed(name)` differs from the checkpoint's config; the
    message advises to use the same or what `or_else` says."""
    saved, now = config_lib.flat(ConfigDict(meta["config"])), config_lib.flat(config)
    for name, value in now.items():
        if is_fixed(name) and saved.get(name) != value:
            raise UserError(
                f"config.{name}={value!r}: the checkpoint was trained with {saved.get(name)!r}; "
                f"use that, or {or_else}"
            )


def check_same_tokenizer(manifest: Manifest, meta: dict) -> None:
    """UserError unless the data were prepared with the tokenizer that the model was trained on."""
    have, want = manifest.tokenizer, meta["tokenizer"]
    if have["fingerprint"] != want["fingerprint"]:
        raise UserError(
            f"{manifest.directory}: prepared with another tokenizer than the checkpoint's "
            f"({have['kind']} of {have['vocab_size']} tokens, {have['fingerprint'][:12]}…, not "
            f"{want['kind']} of {want['vocab_size']} tokens, {want['fingerprint'][:12]}…)"
        )


def load_tokenizer(workdir: pathlib.Path, meta: dict):
    """The tokenizer in a workdir. UserError: it is damaged, or differs from the tokenizer in the
    checkpoint's meta."""
    folder = workdir / "tokenizer"
    tokenizer = open_tokenizer(folder)
    if tokenizer.fingerprint != meta["tokenizer"]["fingerprint"]:
        raise UserError(f"{folder}: not the tokenizer that the checkpoint was trained on")
    return tokenizer


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained model, as evaluate and sample need it."""

    built: Built
    params: dict
    meta: dict
    step: int


def load_trained(
    config, workdir: pathlib.Path, weights: str, mesh, step: str = checkpoint.LATEST
) -> Trained:
    """A checkpoint's `weights` ("ema" or "raw"), verified, split over the mesh.

    Args:
      step: "latest", "best" or a number; see checkpoint_steps.

    Raises:
      UserError: no step is intact, or `config` is of another objective or model.
    """
    built: dict[str, Built] = {}

    def like_of(meta: dict) -> dict:
        check_same_fields(config, meta, lambda name: name in MODEL_FIELDS)
        checkpoint.check_config_is_of(workdir, meta)
        built["it"] = build(config, meta["tokenizer"], mesh)
        return abstract_params(built["it"].model, mesh)

    params, found = checkpoint.read_weights(workdir, weights, like_of, step)
    item = checkpoint.weights_item(weights, found.meta)
    check_finite(params, f"{found.folder}/{item}", "another step may be intact: --step=N")
    return Trained(built["it"], params, found.meta, found.number)
