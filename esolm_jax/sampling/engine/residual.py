"""The residual stream of a decoding pass, and the layers that read it behind a norm."""

import flax.struct
import jax
import jax.numpy as jnp

from esolm_jax.model import layers
from esolm_jax.model.model_config import ModelConfig
from esolm_jax.sampling.engine.quantize import Quantized


@flax.struct.dataclass
class Residual:
    """The residual stream [B, W, D], as a sum.

    Attributes:
      h: the first part.
      added: the second, in the dtype of h, or the parts of its sum, [parts, B, W, D], as
        Projection.product has them; None = nothing. bias: float32 [D], for it.
    """

    h: jax.Array
    added: jax.Array | None = None
    bias: jax.Array | None = None

    def sum(self) -> jax.Array:
        if self.added is None:
            return self.h
        added = self.added
        if added.ndim > self.h.ndim:
            added = added.sum(axis=0).astype(self.h.dtype)
        return self.h + biased(added, self.bias)

    def at(self, tokens_BP) -> "Residual":
        """Of these tokens of each row, indices in W: [B, P, D]."""

        def take(array):
            index = tokens_BP[..., None].reshape((1,) * (array.ndim - 3) + (*tokens_BP.shape, 1))
            return jnp.take_along_axis(array, index, axis=-2)

        return self.replace(h=take(self.h), added=jax.tree.map(take, self.added))


@flax.struct.dataclass
class Layer:
    """A linear layer of a folded network.

    Attributes:
      kernel: [D, …]. bias: float32 […], or None.
      activates: whether the activation of the MLP follows: of [D, gates, F], [B, W, F].
      config: of the trained model, whose norm is before the layer; None = no norm.
    """

    kernel: jax.Array | Quantized
    bias: jax.Array | None
    activates: bool = flax.struct.field(pytree_node=False)
    config: ModelConfig | None = flax.struct.field(pytree_node=False)


def normed(config: ModelConfig, h_BWD):
    """By the model's norm, whose scale and bias are in the weights."""
    return layers.normalize(config, h_BWD).astype(config.dtype)


def biased(y, bias):
    """The products [B, W, …] with their bias […], which may be None."""
    return y if bias is None else y + bias.astype(y.dtype).reshape(1, 1, *bias.shape)
