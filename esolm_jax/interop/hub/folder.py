"""The tensors of a folder of the Hugging Face hub: one safetensors file, or shards and their index.

Tensors are opened, not read: np.asarray(tensor) reads one.
"""

import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from esolm_jax.errors import UserError
from esolm_jax.files import regular_file
from esolm_jax.interop import fit, safetensors_file
from esolm_jax.interop.hub import llada
from esolm_jax.interop.hub import names as hub_names
from esolm_jax.interop.hub.names import HubTensor
from esolm_jax.interop.safetensors_file import Tensor
from esolm_jax.interop.shown import shown
from esolm_jax.model.model_config import ModelConfig

FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_INDEX_SIZE = 64 * regular_file.MB
_BLOCK = re.compile(r"(?:.*\.)?(?:layers|h|blocks)\.([0-9]+)\.")


def tensors(folder: pathlib.Path) -> dict[str, Tensor]:
    """All tensors by name.

    Raises:
      UserError: no safetensors, a missing shard or tensor of the index, or damaged.
    """
    has_index, has_file = (regular_file.is_there(folder / name) for name in (INDEX, FILE))
    if has_index and has_file:
        raise UserError(f"--from={folder}: holds both {FILE} and {INDEX}; remove one of them")
    if has_index:
        return _of_shards(folder)
    if has_file:
        return safetensors_file.read(folder / FILE)[0]
    other = next(folder.glob("pytorch_model*.bin"), None)
    advice = f"; {other.name} is not read, save it as safetensors" if other else ""
    raise UserError(f"--from={folder}: holds neither {FILE} nor {INDEX}{advice}")


def _of_shards(folder: pathlib.Path) -> dict[str, Tensor]:
    index = folder / INDEX
    content = regular_file.read_json(index, _INDEX_SIZE)
    files = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
        raise UserError(f"{index}: damaged: it has no weight_map of names to files")
    names = sorted(set(files.values()))
    if outside := [name for name in names if not name or pathlib.PurePath(name).name != name]:
        raise UserError(f"{index}: refused: it names the file {shown(outside[0])}")
    if missing := [name for name in names if not regular_file.is_there(folder / name)]:
        listed = ", ".join(ascii(name[:100])[1:-1] for name in missing[:8])
        raise UserError(f"--from={folder}: shards are missing: {listed}")
    tensors: dict[str, Tensor] = {}
    for name in names:
        for key, tensor in safetensors_file.read(folder / name)[0].items():
            if key in tensors or files.get(key, name) != name:
                raise UserError(
                    f"{index}: damaged: {shown(key)} is in {shown(name)}, and also in another file "
                    "according to the index or another shard"
                )
            tensors[key] = tensor
    if lost := sorted(files.keys() - tensors.keys()):
        listed = ", ".join(shown(name) for name in lost[:8])
        raise UserError(
            f"--from={folder}: tensors of {INDEX} are missing from all shards: {listed}"
        )
    return tensors


def check_blocks(names: Iterable[str], blocks: int, where: str) -> None:
    """UserError if config.json has many more blocks than the tensors. Bounds the time to list the
    tensors of the model."""
    numbers = {match[1] for name in names if (match := _BLOCK.match(name))}
    if blocks > 2 * len(numbers) + 100:
        raise UserError(
            f"{where}: has {blocks:,} blocks, but the files hold tensors of {len(numbers)}"
        )


def prefix_of(names: Iterable[str], style: str) -> str:
    """The prefix of parameter names; files of the bare backbone have none."""
    prefix = "transformer." if style == "gpt2" else "model."
    return prefix if any(name.startswith(prefix) for name in names) else ""


def parts_of(
    tensors: Mapping[str, Tensor], model: ModelConfig, hub: dict[str, Any], ids: int, tied: bool
) -> list[HubTensor]:
    """The tensors that the model of config.json (`hub`) must have; see hub_names.hub_tensors."""
    prefix = prefix_of(tensors, model.style)
    parts = hub_names.hub_tensors(model, ids, tied=tied, prefix=prefix)
    if hub["model_type"] == llada.MODEL_TYPE:
        parts = [llada.renamed(part, hub, prefix) for part in parts]
    return parts


def check(tensors: Mapping[str, Tensor], parts: list[HubTensor], where: str) -> None:
    """UserError unless the tensors are those of the model, each of its shape."""
    ignored = {name for name in tensors if hub_names.BUFFERS.match(name)}
    wanted = {part.name: part.shape for part in parts}
    heads = {"lm_head.weight", "model.transformer.ff_out.weight"}
    ignored |= heads - wanted.keys()  # tied: the same as the embedding
    fit.check(tensors, wanted, where, ignored)
