"""Opens a file of published weights: its tensors and the hyper-parameters of the run.

Three kinds: a Lightning checkpoint (.ckpt: state_dict, EMA, hyper-parameters), a plain state_dict
(.pt, .bin), and safetensors. Parameter names are those of the backbone, without prefixes.
"""

import dataclasses
import os
import pathlib
import re
from collections.abc import Collection, Mapping
from typing import Any

from esolm_jax.errors import UserError
from esolm_jax.files import regular_file
from esolm_jax.interop import safetensors_file, weight_types
from esolm_jax.interop.published import names as published_names
from esolm_jax.interop.shown import shown
from esolm_jax.interop.torch_file import archive as torch_archive
from esolm_jax.interop.torch_file.objects import Object

_PREFIX = re.compile(r"((module|_orig_mod|backbone)\.)+")  # of wrappers; backbone: the model
_NO_WEIGHTS = re.compile(
    r"(noise|metrics|valid_metrics|test_metrics|train_metrics)\.|sampling_eps_"
)
_CONFIG = "config.json"  # next to the weights, as on the Hugging Face hub
# model_type, in small letters, of folders of the hub with the published code.
_HUB_TYPES = ("mdlm", "bd3lm", "esolm", "duo", "udlm")
_HUB_FILES = ("model.safetensors", "pytorch_model.bin")
_CONFIG_SIZE = 16 * regular_file.MB
# Tied embeddings share a storage. Many names for one small storage would exhaust memory.
_MOST_SHARED = 2


@dataclasses.dataclass(frozen=True)
class Published:
    """The content of a file.

    Attributes:
      path: the file.
      raw: parameter name → tensor (has a shape; np.asarray reads it), in the order of the file.
      shadow: the exponential moving average as stored in the file, or None if there is only one set
        of weights; see `ema`.
      hyper: hyper-parameters as stored in the file, or None; see `find`.
      step: training steps done, or None if unknown.
      ours: the metadata of our own export: {"config", "tokenizer", "step", "weights"}, or None.
    """

    path: pathlib.Path
    raw: Mapping[str, Any]
    shadow: Any = None
    hyper: Any = None
    step: int | None = None
    ours: dict | None = None

    def ema(self) -> dict[str, Any]:
        """The average by parameter name: the file has a list, in the order of the parameters.

        Raises:
          UserError: it is not such a list, or holds something other than weights.
        """
        shadow, advice = self.shadow, "take the other weights: --weights=raw"
        if not isinstance(shadow, list) or len(shadow) != len(self.raw):
            count = len(shadow) if isinstance(shadow, list) else "no list of"
            raise UserError(
                f"{self.path}: the EMA has {count} tensors for {len(self.raw)} parameters; {advice}"
            )
        average = dict(zip(self.raw, shadow, strict=True))
        for name, tensor in average.items():
            where = f"{self.path}: the EMA of {name[:100]}"
            if not hasattr(tensor, "__array__"):
                raise UserError(f"{where} is {shown(tensor)}: must be a tensor; {advice}")
            if tensor.shape != self.raw[name].shape:
                raise UserError(
                    f"{where} has shape {tensor.shape}, the parameter {self.raw[name].shape}; "
                    f"{advice}"
                )
        weight_types.check(average, f"{self.path}, EMA")
        _check_shared(self.path, average.values())
        return average


def in_folder(path: str) -> str:
    """The file of weights in a folder of the hub with the published code (AutoModelForMaskedLM);
    other paths are returned unchanged. UserError: the folder has no such file."""
    folder = regular_file.expand(path)
    config = folder / _CONFIG
    if not os.path.isdir(folder) or not regular_file.is_there(config):
        return path
    kind = find(regular_file.read_json(config, _CONFIG_SIZE), "model_type")
    if not isinstance(kind, str) or kind.lower() not in _HUB_TYPES:
        return path
    for name in _HUB_FILES:
        if regular_file.is_there(folder / name):
            return str(folder / name)
    raise UserError(f"--from={path}: must hold {' or '.join(_HUB_FILES)}")


def read(path: str) -> Published:
    """Opens a file; tensors are read on use.

    Raises:
      UserError: the file is missing, truncated, hostile, or without weights.
    """
    file = regular_file.expand(path)
    with regular_file.open_regular(file, f"--from={path}") as opened:
        start = opened.read(4)
    if file.suffix == ".safetensors":
        return _safetensors(file)
    if start == b"PK\x03\x04":
        return _torch(file)
    if start[:1] == b"\x80":
        raise UserError(
            f"--from={path}: must be a zip file of torch.save, not a bare pickle (before PyTorch "
            "1.6); load and save it with a newer PyTorch"
        )
    raise UserError(f"--from={path}: must be a file of torch.save or *.safetensors")


def _safetensors(file: pathlib.Path) -> Published:
    tensors, about = safetensors_file.read(file)
    raw = _backbone(file, tensors)
    hyper = None if about else _config_of_hub(file)
    return Published(file, raw, hyper=hyper, step=_step(about.get("step")), ours=about or None)


def _config_of_hub(file: pathlib.Path) -> Any:
    """The config.json next to the weights, or None."""
    config = file.with_name(_CONFIG)
    if not regular_file.is_there(config):
        return None
    return regular_file.read_json(config, _CONFIG_SIZE)


def _torch(file: pathlib.Path) -> Published:
    content = torch_archive.Archive(file).content
    if not isinstance(inside(content), dict):
        raise UserError(f"{file}: must hold a dict of tensors, not {shown(content)}")
    content = inside(content)
    state = inside(content.get("state_dict", content))
    if not isinstance(state, dict):
        raise UserError(f"{file}: its state_dict must be a dict, not {shown(state)}")
    raw = _backbone(file, state)
    _check_shared(file, raw.values())
    is_run = state is not content
    ema, shadow = content.get("ema") if is_run else None, None
    if ema is not None:
        shadow = find(ema, "shadow_params")
        shadow = ema if shadow is None else shadow  # `ema` refuses anything but a list
    return Published(
        path=file,
        raw=raw,
        shadow=shadow,
        hyper=content.get("hyper_parameters") if is_run else _config_of_hub(file),
        step=_step(content.get("global_step", find(ema, "num_updates"))),
    )


def _check_shared(file: pathlib.Path, tensors: Collection[Any]) -> None:
    """UserError if the tensors have many more bytes than the file."""
    size, most = sum(tensor.nbytes for tensor in tensors), _MOST_SHARED * file.stat().st_size
    if size > most:
        raise UserError(
            f"{file}: refused: its tensors share their storage: {size:,} bytes of weights in a "
            f"file of {file.stat().st_size:,}"
        )


def _step(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value < 2**31 else None


def _backbone(file: pathlib.Path, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters by name, without prefixes, buffers and tensors of other parts."""
    parameters: dict[str, Any] = {}
    for name, tensor in tensors.items():
        if not isinstance(name, str):
            raise UserError(f"{file}: its state_dict has a key {shown(name)}: must be a string")
        bare = _PREFIX.sub("", name, count=1) if _PREFIX.match(name) else name
        if bare in published_names.CONSTANTS or _NO_WEIGHTS.match(bare):
            continue
        if not hasattr(tensor, "__array__"):
            raise UserError(
                f"{file}: {ascii(name[:100])} is {shown(tensor)}: must be a tensor "
                "(nothing was executed)"
            )
        if bare in parameters:
            raise UserError(f"{file}: {ascii(bare[:100])} appears twice, under two prefixes")
        parameters[bare] = tensor
    if not parameters:
        raise UserError(f"{file}: holds no tensors")
    weight_types.check(parameters, str(file))
    return parameters


def find(node: Any, path: str) -> Any:
    """The value at a dotted path of nested hyper-parameters, or None.

    Looks into dicts, OmegaConf containers and other dict-like objects. References such as
    ${model.length} are not resolved; they give None.
    """
    for key in path.split("."):
        node = inside(node)
        node = node.get(key) if isinstance(node, dict) else None
    node = inside(node)
    return None if isinstance(node, str) and "${" in node else node


def inside(node: Any) -> Any:
    """The dict or scalar inside an Object; the Object itself if it has neither."""
    if not isinstance(node, Object):
        return node
    state = node.state if isinstance(node.state, dict) else {}
    if "_val" in state:  # an OmegaConf scalar
        return state["_val"]
    return state.get("_content") or node.entries or state or node
