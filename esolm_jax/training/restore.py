"""Trained models and runs to resume: a checkpoint and the config that it is read with."""

import dataclasses
import pathlib

from esolm_jax import config as config_lib
from esolm_jax.data.manifest import Manifest, open_tokenizer, tokenizer_entry
from esolm_jax.errors import UserError
from esolm_jax.model import build
from esolm_jax.model.finite import check_finite
from esolm_jax.process import prng
from esolm_jax.training import checkpoint_meta, checkpoint_reader, checkpoint_steps

# Weights can be used only with the values of these fields that they were trained with.
MODEL_FIELDS = config_lib.names_with("fixes_weights")


def check_same_fields(config, meta: dict, is_fixed, advice: str = "another --workdir") -> None:
    """UserError if a field for which `is_fixed(name)` differs from the checkpoint's config; the
    message advises to use the saved value or `advice`."""
    saved = config_lib.flat(checkpoint_meta.config_in(meta))
    for name, value in config_lib.flat(config).items():
        if is_fixed(name) and saved[name] != value:
            raise UserError(
                f"config.{name}={value!r}: must be {saved[name]!r}, as in the checkpoint; "
                f"use that value, or {advice}"
            )


def check_same_tokenizer(manifest: Manifest, meta: dict) -> None:
    """UserError unless the data were prepared with the tokenizer that the model was trained on."""
    have, want = manifest.tokenizer, meta["tokenizer"]
    if have["fingerprint"] != want["fingerprint"]:
        raise UserError(
            f"{manifest.directory}: must be prepared with the tokenizer of the checkpoint "
            f"({describe_tokenizer(want)}), not {describe_tokenizer(have)}"
        )


def load_tokenizer(workdir: pathlib.Path, meta: dict):
    """The tokenizer in a workdir. UserError: it is damaged, or differs from the tokenizer in the
    checkpoint's meta."""
    tokenizer = open_tokenizer(workdir / "tokenizer")
    check_tokenizer(tokenizer, workdir, meta)
    return tokenizer


def check_tokenizer(tokenizer, workdir: pathlib.Path, meta: dict) -> None:
    """UserError if the tokenizer in a workdir differs from the one in the checkpoint's meta."""
    entry = meta["tokenizer"]
    if tokenizer.fingerprint != entry["fingerprint"]:
        raise UserError(
            f"{workdir / 'tokenizer'}: must be the tokenizer of the checkpoint "
            f"({describe_tokenizer(entry)}), not {describe_tokenizer(tokenizer_entry(tokenizer))}"
        )


def describe_tokenizer(entry: dict) -> str:
    """Kind, size and fingerprint of a manifest's entry of a tokenizer, for messages."""
    return f"{entry['kind']} of {entry['vocab_size']} tokens, {entry['fingerprint'][:12]}…"


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """A trained model, as evaluate and sample need it."""

    built: build.BuiltModel
    params: dict
    meta: dict
    step: int


def load_trained(
    config, workdir: pathlib.Path, weights: str, mesh, step: str = checkpoint_steps.LATEST
) -> TrainedModel:
    """A checkpoint's `weights` ("ema" or "raw"), verified, split over the mesh.

    Args:
      step: "latest", "best" or a number; see checkpoint_selection.

    Raises:
      UserError: no step is intact, or `config` is of another objective or model.
    """
    built: dict[str, build.BuiltModel] = {}

    def like_of(meta: dict) -> dict:
        check_same_fields(config, meta, lambda name: name in MODEL_FIELDS)
        checkpoint_meta.check_config_is_of(workdir, meta)
        built["it"] = build.build_model(config, meta["tokenizer"], mesh)
        return build.abstract_params(built["it"].model, mesh)

    params, found = checkpoint_reader.read_weights(workdir, weights, like_of, step)
    item = checkpoint_meta.weights_item(weights, found.meta)
    check_finite(params, f"{found.folder}/{item}", "another step may be intact: --step=N")
    return TrainedModel(built["it"], params, found.meta, found.number)


def check_can_be_resumed(config, manifest: Manifest, workdir: pathlib.Path, meta: dict) -> None:
    """UserError unless the checkpoint with this meta is of the same training run."""
    if meta.get("only_weights"):
        raise UserError(
            f"--workdir={workdir}: holds a pretrained model without the state of an optimizer; "
            f"train from it in another --workdir: --config.init_from={workdir}"
        )
    # Converted weights were trained elsewhere, so only the model must be the same.
    free, fields = meta.get("converted", False), config_lib.fields()
    check_same_fields(
        config,
        meta,
        lambda name: fields[name].fixes_weights if free else not fields[name].may_change_on_resume,
    )
    check_same_tokenizer(manifest, meta)
    prng.check_recorded(meta, f"--workdir={workdir}")


def initial_weights(config, manifest: Manifest, like) -> dict | None:
    """The weights of config.init_from, placed as `like`; None if it is not set.

    Raises:
      UserError: they are of another model, or were trained with another tokenizer.
    """
    source = config.init_from
    if not source:
        return None

    def like_of(meta: dict) -> dict:
        check_same_fields(
            config,
            meta,
            lambda name: name in MODEL_FIELDS and name.startswith("model."),
            f"another config.init_from than {source!r}",
        )
        check_same_tokenizer(manifest, meta)
        return like

    workdir, step = checkpoint_steps.split_source(source)
    try:
        checkpoint_meta.read_meta(workdir, step)
    except UserError as error:
        raise UserError(f"config.init_from={source!r}: {error}") from error
    weights, found = checkpoint_reader.read_weights(workdir, "ema", like_of, step)
    check_finite(weights, f"config.init_from={source!r}: {found.folder}")
    print(f"initial weights: {workdir} at step {found.number:,}; the optimizer state is new")
    return weights
