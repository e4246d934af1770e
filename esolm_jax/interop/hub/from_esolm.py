"""A folder that `export --to=hub` wrote → a workdir, bit for bit; as a config file:
interop/hub/from_esolm.py:FOLDER.

The folder may have been saved again by `transformers`.
"""

import pathlib
from typing import Any

import numpy as np
import tqdm
from ml_collections import ConfigDict

from esolm_jax import config as config_lib
from esolm_jax.data import hub_tokenizer
from esolm_jax.data import tokenizer as tokenizer_lib
from esolm_jax.data.manifest import tokenizer_entry
from esolm_jax.errors import UserError
from esolm_jax.files import regular_file
from esolm_jax.interop import weight_types
from esolm_jax.interop.hub import config as hub_config
from esolm_jax.interop.hub import esolm_names, from_hub, tokenizer_files
from esolm_jax.interop.hub import folder as hub_folder
from esolm_jax.interop.published import read as published_read
from esolm_jax.interop.published.read import Converted
from esolm_jax.model import build, finite
from esolm_jax.training import checkpoint, restore

MODEL_TYPE = "esolm"
_SIZE = 16 * regular_file.MB


def is_folder(path: str) -> bool:
    """Whether `path` is such a folder."""
    file = regular_file.expand(path) / hub_config.FILE
    if not hub_config.is_folder(path) or not regular_file.is_there(file):
        return False
    hub = regular_file.read_json(file, _SIZE)
    # A folder with the published code may have the same model_type.
    return isinstance(hub, dict) and hub.get("model_type") == MODEL_TYPE and "sampling" in hub


def _origin(folder: pathlib.Path) -> dict[str, Any]:
    """The section "esolm" of config.json. UserError: missing or damaged."""
    file = folder / hub_config.FILE
    about = regular_file.read_json(file, _SIZE).get("esolm")
    wanted = {"config": dict, "tokenizer": dict, "step": int, "weights": str}
    if not isinstance(about, dict) or any(
        not isinstance(about.get(name), kind) for name, kind in wanted.items()
    ):
        raise UserError(f"{file}: damaged: its section esolm must have {', '.join(wanted)}")
    return about


def get_config(path: str) -> ConfigDict:
    """The config of the exported run. UserError: damaged, or of a later version."""
    folder = regular_file.expand(path)
    return config_lib.from_saved(_origin(folder)["config"], str(folder / hub_config.FILE))


def convert(config, source: str, workdir: pathlib.Path, tokenizer: str) -> Converted:
    """Writes checkpoint, tokenizer and config of the model in a folder: all of it or nothing.

    Args:
      tokenizer: a file or folder, or "" for the one in `source`.

    Raises:
      UserError: folder, config and tokenizer do not match, or the workdir is not empty.
    """
    published_read.check_empty(workdir)
    folder = regular_file.expand(source)
    about, tensors = _origin(folder), hub_folder.tensors(folder)
    theirs, ours = config_lib.flat(get_config(source)), config_lib.flat(config)
    for name in restore.MODEL_FIELDS:
        if ours[name] != theirs[name]:
            raise UserError(
                f"config.{name}={ours[name]!r}: must be {theirs[name]!r}, as in {source}"
            )
    hub_folder.check_blocks(tensors, config.model.blocks, str(folder / hub_config.FILE))
    chosen = _read_tokenizer(folder, tokenizer, about["tokenizer"])
    with config.unlocked():
        config.data.tokenizer = chosen.kind
        config.data.tokenizer_path = published_read.saved_tokenizer(chosen, workdir)
    model = build.model_config(config, tokenizer_entry(chosen), "cpu")
    parts = esolm_names.tensors(model)
    hub_folder.check(tensors, parts, source)
    weight_types.check({part.name: tensors[part.name] for part in parts}, source)
    origin = {"folder": folder.resolve().name, "model_type": MODEL_TYPE, "step": about["step"]}
    meta = published_read.converted_meta(config, chosen, origin) | {"only_weights": True}

    def save(checkpoints: checkpoint.Checkpoints, draft: pathlib.Path) -> None:
        params = from_hub.on_disk(model, draft / "arrays")
        bad: list[str] = []
        for part in tqdm.tqdm(parts, "tensors", disable=None, leave=False):
            tensor = np.asarray(tensors[part.name])
            bad += finite.non_finite({part.name: tensor})
            part.put(from_hub.parameter(params, part.path), tensor)
        finite.refuse(bad, len(parts), source)
        checkpoints.save_weights(params, meta)

    published_read.write_workdir(workdir, meta, chosen, save)
    size = sum(int(np.prod(part.shape)) for part in parts)
    return Converted(0, size, f"{about['weights']} at step {about['step']:,}")


def _read_tokenizer(folder: pathlib.Path, given: str, entry: dict) -> tokenizer_lib.Tokenizer:
    """The tokenizer of the run. UserError: it is another one."""
    path = regular_file.expand(given) if given else folder / tokenizer_files.OURS
    if not given and not path.is_dir():  # saved again by `transformers`, which drops the folder
        path = folder
    if entry["kind"] == tokenizer_lib.Bytes.kind and not given:
        chosen = tokenizer_lib.Bytes()
    elif entry["kind"] == hub_tokenizer.KIND and not hub_tokenizer.is_here(path):
        raise UserError(
            f"{path}: must hold the tokenizer of the run; copy the folder {tokenizer_files.OURS}/ "
            "of the export here, or give --tokenizer=FOLDER"
        )
    else:
        chosen = tokenizer_lib.read_tokenizer(path)
    if chosen.fingerprint != entry["fingerprint"]:
        raise UserError(
            f"{path}: must be the tokenizer that the model was trained on "
            f"({restore.describe_tokenizer(entry)}), not "
            f"{restore.describe_tokenizer(tokenizer_entry(chosen))}"
        )
    return chosen
