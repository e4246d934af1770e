"""Strict numerics for all tests, on eight fake CPU devices."""

import os

from thorough import ALL, QUICK_XLA

quick = {} if ALL else QUICK_XLA
given = [settings.get("XLA_FLAGS", "") for settings in (os.environ, quick)]
flags = " ".join([*given, "--xla_force_host_platform_device_count=8"])
os.environ |= quick | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
os.environ.setdefault("PJRT_NPROC", "64")  # for why, see distributed.start

import jax  # noqa: E402
import pytest  # noqa: E402
from absl import logging  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "standard")


@pytest.fixture(autouse=True)
def _quiet_libraries():
    """Warnings of Orbax are hidden, as in `cli.run`; tests of flags reset absl's verbosity."""
    logging.set_verbosity(logging.ERROR)


@pytest.fixture(autouse=True, scope="module")
def _drop_programs():
    """Compiled programs of one file are of no use to the next, and take gigabytes."""
    yield
    jax.clear_caches()
