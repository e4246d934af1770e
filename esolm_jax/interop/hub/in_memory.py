"""A pretrained GPT-2, Llama or Qwen → model, weights and tokenizer in memory, without a workdir."""

import dataclasses

import jax
import numpy as np

from esolm_jax.data.manifest import tokenizer_entry
from esolm_jax.data.tokenizer import Tokenizer
from esolm_jax.errors import UserError
from esolm_jax.files import regular_file
from esolm_jax.interop import weight_types
from esolm_jax.interop.hub import config as hub_config
from esolm_jax.interop.hub import folder as hub_folder
from esolm_jax.interop.hub import from_hub
from esolm_jax.model import build
from esolm_jax.model import transformer as model_lib
from esolm_jax.model.model_config import ModelConfig
from esolm_jax.process import prng


@dataclasses.dataclass(frozen=True)
class HubModel:
    """A pretrained autoregressive model.

    Attributes:
      model: its sizes; dtype float32.
      params: float32, NumPy arrays. The vocabulary is the folder's ids and, one past them, a mask
        token that the model was not trained with.
      tokenizer: of the folder.
    """

    model: ModelConfig
    params: dict
    tokenizer: Tokenizer


def read(source: str, platform: str) -> HubModel:
    """The model of a folder. `platform` ("cpu", "gpu", "tpu") chooses its attention.

    Raises:
      UserError: an unsupported architecture, missing files, or parts that do not fit each other.
    """
    folder = regular_file.expand(source)
    hub, settings = hub_config.read(folder), str(folder / hub_config.FILE)
    if hub_config.is_diffusion(hub):
        raise UserError(f"{settings}: model_type={hub['model_type']}: must be autoregressive")
    config = hub_config.get_config(source)
    tied = hub_config.is_tied(hub, settings)
    tensors = hub_folder.tensors(folder)
    hub_folder.check_blocks(tensors, config.model.blocks, settings)
    ids = from_hub.num_ids(hub, folder)
    tokenizer = from_hub.read_tokenizer(folder, "", hub, ids)
    model = build.model_config(config, tokenizer_entry(tokenizer), platform)
    model = dataclasses.replace(model, dtype="float32")
    parts = hub_folder.parts_of(tensors, model, hub, ids, tied)
    hub_folder.check(tensors, parts, source)
    weight_types.check({part.name: tensors[part.name] for part in parts}, source)
    shapes = jax.eval_shape(lambda: model_lib.init(model, prng.key(0)))
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
    from_hub.fill(params, tensors, parts, ids, source)
    return HubModel(model, params, tokenizer)
