"""Random keys with a fixed generator; no other module makes keys.

JAX's default generator is a setting of the environment (JAX_DEFAULT_PRNG_IMPL). With `rbg`, which
is common on TPUs, a draw depends on its batch, so texts would depend on each other. Keys of other
generators have other shapes, so a run cannot resume with another generator.
"""

import jax
import jax.numpy as jnp
import numpy as np

from esolm_jax.errors import UserError

IMPL = "threefry2x32"  # checkpoints record it; those without a record used it, too
# For dropout: IMPL, or a cheap hash. config.model.dropout_bits names it.
GENERATORS = (IMPL, "mix32")
# Other values change the draws of a key.
REQUIRED = {
    "jax_threefry_partitionable": True,
    "jax_random_seed_offset": 0,
    "jax_enable_x64": False,
}


def key(seed) -> jax.Array:
    """A key of the generator IMPL from an integer in [0, 2**32).

    Raises:
      UserError: a setting of JAX changes the draws of keys; jax_settings.pinned() resets it.
    """
    for name, value in REQUIRED.items():
        if (given := getattr(jax.config, name)) != value:
            raise UserError(
                f"{name}={given}: must be {value}, because the draws of a seed depend on it"
            )
    return jax.random.key(seed, impl=IMPL)


def wrap(data) -> jax.Array:
    """Keys from their raw data, uint32 [..., 2]."""
    return jax.random.wrap_key_data(data, impl=IMPL)


def mix32(key, shape: tuple[int, ...]) -> jax.Array:
    """Random uint32 of this shape [rows, …], for dropout: a hash of the key, the row and the index
    in it. About 20 operations a value where IMPL takes 100, fused into the code that uses it, and
    the same on every mesh. Not for draws whose joint distribution matters.
    """
    words = jax.random.key_data(key)
    index, stride = jnp.zeros(shape, jnp.uint32), 1
    for axis in range(len(shape) - 1, 0, -1):
        index += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * np.uint32(stride % 2**32)
        stride *= shape[axis]
    row = jax.lax.broadcasted_iota(jnp.uint32, (shape[0],) + (1,) * (len(shape) - 1), 0)
    row_word = _mixed(words[0] + row * np.uint32(0x9E3779B9))  # 2³² over the golden ratio: odd
    return _mixed(_mixed(index ^ row_word) + words[1])


def _mixed(x):
    """A bijection of uint32 in which each bit of the argument flips each bit of the result with a
    probability of about 1/2 (lowbias32, by C. Wellons)."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
    return x ^ (x >> np.uint32(16))


def as_key(value, name: str) -> jax.Array:
    """A key from an int, a key, or a key's raw data; `name` of the argument is for the message.

    Raises:
      UserError: a key of another generator.
    """
    if not isinstance(value, jax.Array):
        return key(int(value))
    if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        impl = str(jax.random.key_impl(value))
    else:
        impl = IMPL if value.shape == (2,) else f"raw data of shape {value.shape}"
        value = wrap(value) if impl == IMPL else value
    if impl != IMPL:
        raise UserError(f"{name}: must be a key of {IMPL!r}, not {impl!r}; use prng.key(seed)")
    return value


def check_recorded(meta: dict, source: str) -> None:
    """UserError if the checkpoint with this meta was trained with another generator."""
    if (recorded := meta.get("prng", IMPL)) != IMPL:
        raise UserError(f"{source}: its random keys are of {recorded!r}; they must be of {IMPL!r}")
