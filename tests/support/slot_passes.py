"""Passes of the cached network over consecutive slots of a text in a random order."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from compilation import compiling
from styles import params_of

from esolm_jax.family.labels import Tokens
from esolm_jax.model import transformer
from esolm_jax.sampling.engine import network
from esolm_jax.sampling.engine.network import Window

LENGTH = 12


def labels(rows=4):
    """Tokens in a random order of positions, each reading those before it."""
    rng = np.random.default_rng(0)
    token = jnp.asarray(rng.integers(0, 12, (rows, LENGTH)), jnp.int32)
    order = np.argsort(rng.random((rows, LENGTH)), axis=1)
    rank = jnp.tile(jnp.arange(LENGTH, dtype=jnp.int32), (rows, 1))
    return token, jnp.asarray(order, jnp.int32), rank


@functools.cache
def wanted(config):
    """Logits of the model [rows, LENGTH, V]. As expected values they are compiled fast."""
    token, position, rank = labels()
    tokens = Tokens(token, position, rank, jnp.ones_like(token, bool))
    with compiling(fast=True):
        return np.asarray(jax.jit(transformer.bind(config))(params_of(config), tokens))


@functools.partial(jax.jit, static_argnames="width")
def run(net, cache, low, width):
    """A pass over the slots [low, low + width): its logits, and the cache with them."""
    token, position, rank = (jax.lax.dynamic_slice_in_dim(a, low, width, 1) for a in labels())
    start = jnp.full(len(token), low, jnp.int32)
    pick = jnp.tile(jnp.arange(width), (len(token), 1))
    window = Window(token, position, rank, jnp.ones_like(token, bool), start, pick)
    logits, entries = network.forward(net, window, cache)
    return logits, cache.write(entries, start)
