"""The tensors of a folder of the Hugging Face hub: one safetensors file, or shards and their index.

Opened, not read: np.asarray(tensor) reads one.
"""

import json
import pathlib
from collections.abc import Iterable, Mapping

from esolm_jax.errors import UserError
from esolm_jax.interop import fit, hub_names, safetensors_file
from esolm_jax.interop.hub_names import Part
from esolm_jax.interop.safetensors_file import Tensor

FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def tensors(folder: pathlib.Path) -> dict[str, Tensor]:
    """All tensors by name.

    Raises:
      UserError: no safetensors, a shard or a tensor that the index names is missing, damaged.
    """
    if (folder / INDEX).is_file():
        return _of_shards(folder)
    if (folder / FILE).is_file():
        return safetensors_file.read(folder / FILE)[0]
    other = next(folder.glob("pytorch_model*.bin"), None)
    advice = f"; {other.name} is not read, save it as safetensors" if other else ""
    raise UserError(f"--from={folder}: holds neither {FILE} nor {INDEX}{advice}")


def _of_shards(folder: pathlib.Path) -> dict[str, Tensor]:
    index = folder / INDEX
    try:
        files = json.loads(index.read_text("utf-8"))["weight_map"]
        names = sorted(set(files.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: damaged: it has no weight_map of names to files") from error
    if outside := [name for name in names if pathlib.PurePath(name).name != name]:
        raise UserError(f"{index}: refused: it names the file {ascii(outside[0])[:100]}")
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise UserError(f"--from={folder}: shards are missing: {', '.join(missing[:8])}")
    found: dict[str, Tensor] = {}
    for name in names:
        found |= safetensors_file.read(folder / name)[0]
    if lost := sorted(files.keys() - found.keys()):
        raise UserError(f"--from={folder}: {INDEX} names tensors that no shard holds: {lost[:8]}")
    return found


def prefix_of(names: Iterable[str], style: str) -> str:
    """What parameter names begin with: files of the bare backbone have no prefix."""
    prefix = "transformer." if style == "gpt2" else "model."
    return prefix if any(name.startswith(prefix) for name in names) else ""


def check(found: Mapping[str, Tensor], parts: list[Part], where: str) -> None:
    """UserError unless the tensors are those of the model, each of its shape."""
    ignored = {name for name in found if hub_names.BUFFERS.match(name)}
    wanted = {part.name: part.shape for part in parts}
    if "lm_head.weight" not in wanted:
        ignored.add("lm_head.weight")  # tied: the same as the embedding
    fit.check(found, wanted, where, ignored)
