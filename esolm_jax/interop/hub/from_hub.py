"""A pretrained GPT-2, Llama or Qwen → a workdir with an `ar` model; LLaDA, Dream or SDAR → one
with a diffusion model.

Tensors are copied one by one into memory-mapped files of the size of our parameters, and from
there in pieces into the checkpoint, so one tensor is in memory at a time, for a model of any size
(the system can drop pages of mapped files). The files need 4 bytes per parameter on disk and
are deleted at the end.
"""

import pathlib

import jax
import numpy as np
import tqdm

from esolm_jax import config as config_lib
from esolm_jax.data import hub_tokenizer
from esolm_jax.data import tokenizer as tokenizer_lib
from esolm_jax.data.manifest import tokenizer_entry
from esolm_jax.errors import UserError
from esolm_jax.files import regular_file
from esolm_jax.interop import weight_types
from esolm_jax.interop.hub import config as hub_config
from esolm_jax.interop.hub import folder as hub_folder
from esolm_jax.interop.hub import masks, qwen_files, tokenizer_files
from esolm_jax.interop.hub import names as hub_names
from esolm_jax.interop.published import read as published_read
from esolm_jax.interop.published.read import Converted
from esolm_jax.interop.shown import shown
from esolm_jax.model import build, finite
from esolm_jax.model import transformer as model_lib
from esolm_jax.model.model_config import ModelConfig
from esolm_jax.process import prng
from esolm_jax.training import checkpoint, restore

_MOST_IDS = 2**31 - 1


def convert(config, source: str, workdir: pathlib.Path, tokenizer: str) -> Converted:
    """Writes checkpoint, tokenizer and config of the model in a folder: all of it or nothing.

    The vocabulary is that of its embedding. An autoregressive model has no mask token, so one is
    added as the last id. Its row of the embedding is the mean of the others, because RMSNorm would
    amplify zeros or small noise; its column of the head is 0.

    Args:
      config: as of hub_config.get_config; objective and config.model must be those of the folder.
      source: the folder.
      tokenizer: a file or folder, or "" for the one in `source`.

    Raises:
      UserError: folder, config and tokenizer do not match, or the workdir is not empty.
    """
    published_read.check_empty(workdir)
    folder = regular_file.expand(source)
    hub, settings = hub_config.read(folder), str(folder / hub_config.FILE)
    _check_config(config, source)
    tied = hub_config.is_tied(hub, settings)
    tensors = hub_folder.tensors(folder)
    hub_folder.check_blocks(tensors, config.model.blocks, settings)
    ids = num_ids(hub, folder)
    chosen = read_tokenizer(folder, tokenizer, hub, ids)
    print(masks.describe(chosen, hub))
    with config.unlocked():
        config.data.tokenizer, config.data.vocab_size = chosen.kind, ids
        config.data.tokenizer_path = published_read.saved_tokenizer(chosen, workdir)
    model = build.model_config(config, tokenizer_entry(chosen), "cpu")
    parts = hub_folder.parts_of(tensors, model, hub, ids, tied)
    hub_folder.check(tensors, parts, source)
    weight_types.check({part.name: tensors[part.name] for part in parts}, source)
    origin = {"folder": folder.resolve().name, "model_type": hub["model_type"]}
    meta = published_read.converted_meta(config, chosen, origin) | {"only_weights": True}

    def save(checkpoints: checkpoint.Checkpoints, draft: pathlib.Path) -> None:
        params = on_disk(model, draft / "arrays")
        fill(params, tensors, parts, ids, source)
        checkpoints.save_weights(params, meta)

    published_read.write_workdir(workdir, meta, chosen, save)
    shapes = jax.tree.leaves(_shapes(model))
    return Converted(0, sum(a.size for a in shapes), "its one set of weights")


def _check_config(config, source: str) -> None:
    """UserError unless the config matches the folder's model."""
    theirs, ours = config_lib.flat(hub_config.get_config(source)), config_lib.flat(config)
    for name in restore.MODEL_FIELDS:
        if ours[name] != theirs[name]:
            raise UserError(
                f"config.{name}={ours[name]!r}: must be {theirs[name]!r}, as in {source}"
            )


def num_ids(hub: dict, folder: pathlib.Path) -> int:
    """Rows of the folder's embedding. UserError: config.json does not say."""
    ids = hub.get("vocab_size")
    if type(ids) is not int or not 2 <= ids <= _MOST_IDS:
        raise UserError(
            f"{folder / hub_config.FILE}: vocab_size={shown(ids)}: must be the number of ids"
        )
    return ids


def read_tokenizer(
    folder: pathlib.Path, given: str, hub: dict, ids: int
) -> tokenizer_lib.Tokenizer:
    """The tokenizer, as large as the embedding: tokenizer.json unchanged, or one of our kinds."""
    ours = folder / tokenizer_files.OURS
    is_ours = not given and ours.is_dir()  # our own export: the same tokenizer again
    path = regular_file.expand(given) if given else ours if is_ours else folder
    file = path / hub_tokenizer.FILE if path.is_dir() else path
    if file.name == hub_tokenizer.FILE and regular_file.is_there(file) and not is_ours:
        content, where = regular_file.read_bytes(file, hub_tokenizer.MAX_SIZE), file
    elif hub_config.is_diffusion(hub) and regular_file.is_there(path / qwen_files.VOCAB):
        content, where = qwen_files.read(path), path / qwen_files.VOCAB
    else:
        return _our_tokenizer(given or path, ids)
    special = masks.special_ids(content, hub, ids, str(folder / hub_config.FILE))
    companions = hub_tokenizer.read_companions(where.parent)
    companions |= hub_tokenizer.read_companions(folder, hub_tokenizer.OF_MODEL)
    return hub_tokenizer.HubTokenizer(content, special, str(where), companions)


def _our_tokenizer(path: str | pathlib.Path, ids: int) -> tokenizer_lib.Tokenizer:
    """One of our kinds. UserError: it has not as many ids as the embedding."""
    chosen = tokenizer_lib.read_tokenizer(path)
    if chosen.vocab_size != ids or chosen.mask_id != ids:
        raise UserError(
            f"{path}: the {chosen.kind} tokenizer has {chosen.vocab_size} ids; must have {ids}, as "
            "the model in its folder"
        )
    return chosen


def _shapes(model: ModelConfig) -> dict:
    return jax.eval_shape(lambda: model_lib.init(model, prng.key(0)))


def on_disk(model: ModelConfig, folder: pathlib.Path) -> dict:
    """Our parameters: float32 files of zeros."""
    folder.mkdir()

    def make(path, leaf):
        file = folder / jax.tree_util.keystr(path, simple=True, separator=".")
        return checkpoint.OnDisk(file, np.float32, "w+", shape=leaf.shape)

    return jax.tree.map_with_path(make, _shapes(model))


def parameter(params: dict, path: str):
    """The array at a path such as "blocks/qkv/kernel"."""
    for key in path.split("/"):
        params = params[key]
    return params


def fill(params: dict, tensors, parts: list[hub_names.HubTensor], ids: int, where: str) -> None:
    """Writes all tensors into `params` (arrays of zeros), and the embedding of a new mask token.
    UserError: a value is not finite."""
    bad: list[str] = []
    for part in tqdm.tqdm(parts, "tensors", disable=None, leave=False):
        tensor = np.asarray(tensors[part.name])
        bad += finite.non_finite({part.name: tensor})
        if not bad:
            part.put(parameter(params, part.path), tensor)
    finite.refuse(bad, len(parts), where)
    embedding = params["embedding"]["embedding"]
    if len(embedding) > ids:
        embedding[ids] = np.mean(embedding[:ids], axis=0, dtype=np.float64)
