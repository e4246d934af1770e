"""Settings of JAX from the environment: pinned if they change the draws of a seed, recorded if they
change the last digits only.

Verbs run under pinned(). Settings of library callers are unchanged; prng.key refuses those that
change the draws of a seed.
"""

import contextlib
import os
import shlex
from collections.abc import Iterator

import jax

from esolm_jax.errors import UserError
from esolm_jax.process import prng

# Other values change the texts and weights of a config and seed, or fail.
PINNED = {
    "jax_default_prng_impl": prng.IMPL,
    **prng.REQUIRED,
    "jax_high_dynamic_range_gumbel": False,
    "jax_legacy_prng_key": "allow",
    "jax_numpy_dtype_promotion": "standard",
    "jax_explicit_x64_dtypes": "warn",
}
# The user's choice, with JAX's default; they change the last digits of results.
RECORDED = {
    "jax_default_matmul_precision": None,
    "jax_debug_nans": False,
    "jax_debug_infs": False,
    "jax_disable_most_optimizations": False,
    "jax_softmax_custom_jvp": False,
    "jax_allow_f16_reductions": True,
    "jax_use_shardy_partitioner": True,
}
_NO_EFFECT = ("--xla_dump_", "--xla_force_host_platform_device_count", "--xla_hlo_profile")


@contextlib.contextmanager
def pinned() -> Iterator[None]:
    """Within this context JAX has the settings of PINNED, independent of the environment.

    Raises:
      UserError: JAX_DISABLE_JIT is set (constant masks would be traced).
    """
    if jax.config.jax_disable_jit:
        raise UserError("JAX_DISABLE_JIT: must be off; to find NaNs, set JAX_DEBUG_NANS=1")
    before = {name: getattr(jax.config, name) for name in PINNED if hasattr(jax.config, name)}
    for name in before:
        jax.config.update(name, PINNED[name])
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def recorded() -> dict:
    """The settings of RECORDED that differ from JAX's defaults, and XLA_FLAGS that may change the
    last digits; JSON-able, for a checkpoint's meta and for results."""
    values = {name: getattr(jax.config, name, default) for name, default in RECORDED.items()}
    changed = {name: value for name, value in values.items() if value != RECORDED[name]}
    flags = [f for f in _split(os.environ.get("XLA_FLAGS", "")) if not f.startswith(_NO_EFFECT)]
    return changed | ({"XLA_FLAGS": " ".join(flags)} if flags else {})


def _split(flags: str) -> list[str]:
    try:
        return shlex.split(flags)
    except ValueError:
        return flags.split()


def note() -> str | None:
    """One line about settings of JAX that were changed, or None."""
    changed = {name: value for name, value in recorded().items() if name != "XLA_FLAGS"}
    return f"note: {_listed(changed)}: the last digits of results may differ" if changed else None


def change_since(meta: dict) -> str | None:
    """One line if the checkpoint of this meta was trained under other recorded settings."""
    then, now = meta.get("jax_settings"), recorded()
    if then is None or then == now:
        return None
    return (
        f"note: trained until here with {_listed(then)}, from here with {_listed(now)}: the last "
        "digits of results may differ from those of an uninterrupted run"
    )


def _listed(settings: dict) -> str:
    said = ", ".join(f"{name}={value}" for name, value in settings.items())
    return said or "JAX's defaults"
