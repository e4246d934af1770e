"""The random numbers of loops that draw again in every pass."""

from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp

from esolm_jax.sampling.engine.choose import gumbel, keys_of, log_uniform

# Purposes beside those of choose.py.
PASS_TOKEN, PASS_PLACE = 3, 4


class Noise(Protocol):
    """Noise of a pass; a pytree. Shapes follow `position` int32 [B, W]."""

    def tokens(self, pass_index: Any, position_BW: jax.Array, vocab_size: int) -> jax.Array:
        """Standard Gumbel noise float32 [B, W, V]."""
        ...

    def places(self, pass_index: Any, position_BW: jax.Array) -> jax.Array:
        """Logarithms of uniform draws, float32 [B, W]."""
        ...


@flax.struct.dataclass
class KeyedNoise:
    """Noise that depends on the row's key, the pass and the position only."""

    row_keys: jax.Array

    def tokens(self, pass_index: Any, position_BW: jax.Array, vocab_size: int) -> jax.Array:
        return gumbel(keys_of(self._keys(pass_index), position_BW, PASS_TOKEN), vocab_size)

    def places(self, pass_index: Any, position_BW: jax.Array) -> jax.Array:
        return log_uniform(keys_of(self._keys(pass_index), position_BW, PASS_PLACE))

    def _keys(self, pass_index):
        return jax.vmap(jax.random.fold_in, (0, None))(self.row_keys, pass_index)


@flax.struct.dataclass
class PassNoise:
    """The noise of one pass, drawn when it is used."""

    noise: Noise
    pass_index: jax.Array
    position_BW: jax.Array
    vocab_size: int = flax.struct.field(pytree_node=False)

    def tokens(self) -> jax.Array:
        """Standard Gumbel noise float32 [B, W, V]."""
        return self.noise.tokens(self.pass_index, self.position_BW, self.vocab_size)

    def log_uniform(self) -> jax.Array:
        """Logarithms of uniform draws, float32 [B, W]."""
        return self.noise.places(self.pass_index, self.position_BW)

    def gumbel(self) -> jax.Array:
        """Standard Gumbel noise float32 [B, W]."""
        return -jnp.log(-self.log_uniform())
