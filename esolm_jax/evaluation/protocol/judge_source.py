"""The model of a judge: a pretrained model of a hub folder, or an `ar` model of a workdir."""

import dataclasses
from pathlib import Path

import jax
from jax.sharding import Mesh

from esolm_jax.data.hub_tokenizer import HubTokenizer
from esolm_jax.data.tokenizer import Tokenizer
from esolm_jax.data.wordpieces import WordPieces
from esolm_jax.errors import UserError
from esolm_jax.files import regular_file
from esolm_jax.interop.hub import config as hub_config
from esolm_jax.interop.hub import in_memory
from esolm_jax.model.model_config import ModelConfig
from esolm_jax.parallel import sharding
from esolm_jax.training import checkpoint_meta, checkpoint_steps, restore

CONTEXT = 1024  # tokens of a context, of a pretrained model


@dataclasses.dataclass(frozen=True)
class JudgeModel:
    """An autoregressive model, in float32 on a mesh.

    Attributes:
      start_id: the token in front of each context, from which the first one is predicted; None:
        pretrained models have none, and the first token of a context cannot be scored.
      context_length: the tokens of a context that the model was trained with (pretrained: at most
        CONTEXT).
    """

    model: ModelConfig
    params: dict
    tokenizer: Tokenizer
    mask_id: int
    start_id: int | None
    context_length: int


def one_device() -> Mesh:
    """A mesh of the first device."""
    return sharding.mesh_of(jax.devices()[0])


def read(source: str | Path, mesh: Mesh) -> JudgeModel:
    """The model of a folder of the Hugging Face hub, or of a workdir (its latest EMA weights).

    Raises:
      UserError: an unsupported architecture or family, or missing or damaged files.
    """
    check(source)
    folder = regular_file.expand(source)
    return _of_workdir(folder, mesh) if _is_workdir(folder) else _of_hub(str(source), mesh)


def check(source: str | Path) -> None:
    """UserError unless the folder can be that of a judge; reads no weights."""
    folder = regular_file.expand(source)
    if _is_workdir(folder):
        objective = checkpoint_meta.saved_config(folder, checkpoint_steps.LATEST).objective
        if objective != "ar":
            raise UserError(
                f"{folder}: objective {objective}: a judge must be ar, which has the likelihood of "
                "each token given those before it"
            )
    elif not regular_file.is_there(folder / hub_config.FILE):
        raise UserError(
            f"{folder}: no judge: must be a folder of the Hugging Face hub (config.json, "
            "*.safetensors, tokenizer.json) or the workdir of an ar model"
        )
    else:
        hub_config.read(folder)


def _is_workdir(folder: Path) -> bool:
    return (folder / checkpoint_steps.FOLDER).is_dir()


def _of_hub(source: str, mesh: Mesh) -> JudgeModel:
    found = in_memory.read(source, sharding.platform(mesh))
    if not isinstance(found.tokenizer, WordPieces | HubTokenizer):
        raise UserError(
            f"{source}: holds a {found.tokenizer.kind} tokenizer; a judge needs tokenizer.json"
        )
    longest = found.model.max_positions or CONTEXT
    where = sharding.parameters(mesh, found.params)
    params = jax.tree.map(sharding.put, found.params, where)
    mask_id = found.tokenizer.mask_id
    return JudgeModel(found.model, params, found.tokenizer, mask_id, None, min(longest, CONTEXT))


def _of_workdir(folder: Path, mesh: Mesh) -> JudgeModel:
    config = checkpoint_meta.saved_config(folder, checkpoint_steps.LATEST)
    trained = restore.load_trained(config, folder, "ema", mesh)
    special = trained.built.special
    return JudgeModel(
        model=dataclasses.replace(trained.built.model, dtype="float32"),
        params=trained.params,
        tokenizer=restore.load_tokenizer(folder, trained.meta),
        mask_id=special.mask,
        start_id=None if trained.meta.get("only_weights") else special.start,
        context_length=config.data.seq_len,
    )
