"""What train, evaluate and sample build alike from a config: sizes, special ids, placement."""

import dataclasses
import pathlib

import jax
from ml_collections import ConfigDict

from esolm_jax import checkpoint, sharding
from esolm_jax import config as config_lib
from esolm_jax import model as model_lib
from esolm_jax.data.manifest import Manifest, check, load_manifest
from esolm_jax.errors import UserError
from esolm_jax.objectives import Special


def data_dir(config, workdir: pathlib.Path) -> pathlib.Path:
    """Where the prepared data of a run lie."""
    return pathlib.Path(config.data.dir).expanduser() if config.data.dir else workdir / "data"


def load_data(config, workdir: pathlib.Path) -> Manifest:
    """The run's manifest; UserError if the data are missing or not what config.data says."""
    manifest = load_manifest(data_dir(config, workdir))
    check(manifest, config)
    return manifest


def model_config(config, tokenizer: dict) -> model_lib.ModelConfig:
    """Sizes of the model: config.model and the tokenizer's vocabulary with the mask token."""
    m = config.model
    return model_lib.ModelConfig(
        vocab_size=tokenizer["vocab_size"] + 1,
        width=m.width,
        blocks=m.blocks,
        heads=m.heads,
        cond_width=m.cond_width,
        dropout=m.dropout,
        dtype=m.dtype,
        unroll=m.unroll,
    )


def special_ids(tokenizer: dict) -> Special:
    return Special(mask=tokenizer["mask_id"], start=tokenizer["bos_id"])


def abstract_params(config: model_lib.ModelConfig, mesh):
    """ShapeDtypeStructs of the parameters, placed on the mesh."""
    return sharding.abstract(lambda: model_lib.init(config, jax.random.key(0)), mesh)


def check_same_fields(config, meta: dict, is_fixed) -> None:
    """UserError if a field for which `is_fixed(name)` differs from the checkpoint's config."""
    saved, now = config_lib.flat(ConfigDict(meta["config"])), config_lib.flat(config)
    for name, value in now.items():
        if is_fixed(name) and saved.get(name) != value:
            raise UserError(
                f"config.{name}={value!r}: the checkpoint was trained with {saved.get(name)!r}; "
                "use that, or another --workdir"
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


_MODEL_FIELDS = ("objective", "model.width", "model.blocks", "model.heads", "model.cond_width")


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained model, as evaluate and sample need it."""

    config: model_lib.ModelConfig
    params: dict
    special: Special
    meta: dict
    step: int


def load_trained(config, workdir: pathlib.Path, weights: str, mesh) -> Trained:
    """The latest checkpoint's `weights` ("ema" or "raw"), whole on every device of the mesh.

    Raises:
      UserError: there is none, or `config` is of another objective or model.
    """
    meta = checkpoint.read_meta(workdir)
    check_same_fields(config, meta, lambda name: name in _MODEL_FIELDS)
    sizes = model_config(config, meta["tokenizer"])
    params, step = checkpoint.restore_weights(workdir, weights, abstract_params(sizes, mesh))
    return Trained(sizes, params, special_ids(meta["tokenizer"]), meta, step)
