"""The model of a config: its sizes, special ids and head, sharded over a mesh."""

import dataclasses
import functools
from collections.abc import Callable

import jax

from esolm_jax import config as config_lib
from esolm_jax.attention import attend as attention
from esolm_jax.attention import kinds
from esolm_jax.errors import UserError
from esolm_jax.family.phase import SpecialIds
from esolm_jax.model import transformer as model_lib
from esolm_jax.model.lm_head import Head
from esolm_jax.model.model_config import ModelConfig
from esolm_jax.parallel import sharding
from esolm_jax.process import prng

# Fields of config.model that are sizes of the model, not policies of its programs.
SIZES = tuple(
    name.removeprefix("model.")
    for name in config_lib.names_with("fixes_weights")
    if name.startswith("model.")
)


def model_config(config, tokenizer: dict, platform: str) -> ModelConfig:
    """Sizes of the model: config.model and the tokenizer's vocabulary with the mask token.
    `platform` ("cpu", "gpu", "tpu") determines what is "auto". Without remat, blocks with split
    parameters stay a scan: the compiler would gather each once, and hold all of them whole."""
    m = config.model
    unrolls = platform == "gpu" and (config.mesh.fsdp == 1 or m.remat != "none")
    return ModelConfig(
        vocab_size=num_ids(tokenizer),
        dropout=m.dropout,
        dropout_bits=dropout_bits(m.dropout_bits, platform),
        dtype=m.dtype,
        unroll=m.unroll or (m.blocks if unrolls else 1),
        attention=attention.resolve(m.attention, platform, config.data.seq_len),
        remat=m.remat,
        **{name: m[name] for name in SIZES},
    )


def dropout_bits(name: str, platform: str) -> str:
    """The generator that "auto" stands for on a platform; other names unchanged."""
    if name != "auto":
        return name
    return prng.IMPL if platform == "cpu" else "mix32"


def num_ids(tokenizer: dict) -> int:
    """The size of a model's vocabulary: the ids of the tokenizer, and the mask token."""
    return max(tokenizer["vocab_size"], tokenizer["mask_id"] + 1)


@dataclasses.dataclass(frozen=True)
class BuiltModel:
    """A model on a mesh, with its head and special ids."""

    mesh: jax.sharding.Mesh
    model: ModelConfig
    apply: Callable
    head: Head
    special: SpecialIds


def build_model(config, tokenizer: dict, mesh) -> BuiltModel:
    """The model of `config` with the vocabulary of `tokenizer` (as in a manifest).

    Raises:
      UserError: a size does not divide by the mesh; the attention is for other devices, or
        cuDNN's, which does not take the dtype or the heads.
    """
    config_lib.validate_mesh(config, mesh.shape)
    platform = sharding.platform(mesh)
    model = model_config(config, tokenizer, platform)
    if kinds.PLATFORM.get(model.attention, platform) != platform:
        raise UserError(
            f"config.model.attention={model.attention!r}: "
            f"must be an implementation for {platform.upper()}s, not "
            f"{kinds.PLATFORM[model.attention].upper()}s"
        )
    if model.attention == "cudnn":
        _check_cudnn(model)
    start = tokenizer["mask_id" if config.start_token == "mask" else "bos_id"]
    special = SpecialIds(mask=tokenizer["mask_id"], start=start)
    head = Head.of(model, special.mask, mesh, chunk=config.model.loss_chunk)
    return BuiltModel(mesh, model, model_lib.bind(model, mesh), head, special)


def _check_cudnn(model: ModelConfig) -> None:
    if model.dtype != "bfloat16":
        raise UserError(
            f"config.model.dtype={model.dtype!r}: must be bfloat16, because "
            "config.model.attention='cudnn' computes in 16 bits"
        )
    if model.head_width > kinds.CUDNN_WIDTH:
        raise UserError(
            f"config.model.attention='cudnn': must be another for heads of width "
            f"{model.head_width}, because cuDNN's are at most {kinds.CUDNN_WIDTH} wide"
        )


def abstract_params(config: ModelConfig, mesh):
    """ShapeDtypeStructs of the parameters, sharded over the mesh."""
    shapes = _shapes(config)
    return jax.tree.map(
        lambda a, where: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where),
        shapes,
        sharding.parameters(mesh, shapes),
    )


@functools.lru_cache(maxsize=16)
def _shapes(config: ModelConfig) -> dict:
    """Shapes of the parameters; to trace the initialisation takes 0.1 s."""
    return jax.eval_shape(lambda: model_lib.init(config, prng.key(0)))
