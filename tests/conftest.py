"""Strict numerics for all tests, on eight fake CPU devices."""

import gc
import os
import pathlib

flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
os.environ |= {"XLA_FLAGS": flags.strip(), "JAX_PLATFORMS": "cpu"}
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # workers compile for TPUs at a time
os.environ.setdefault("PJRT_NPROC", "64")  # for why, see distributed.start

import compilation  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402
from absl import logging  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "standard")
gc.set_threshold(10_000, 10, 10)  # tracing makes many objects and few cycles
compilation.install()
jax.config.update(compilation.FAST_SETTING, True)  # while modules are imported


# The modules that take longest. Workers take whole modules in this order, then the others by name,
# so that none begins a long one when the rest is done.
LONGEST = (
    "training/test_same_numbers.py",
    "interop/test_export.py",
    "training/test_train.py",
    "parallel/test_distributed.py",
    "sampling/test_golden_sampling.py",
    "sampling/test_sampling.py",
    "sampling/test_speculate.py",
    "verbs/test_command_line.py",
    "sampling/test_quantized.py",
    "sampling/test_network.py",
    "model/test_model.py",
    "verbs/test_python_api.py",
    "aot/test_compile.py",
    "attention/test_attention.py",
    "sampling/test_control.py",
)
TESTS = pathlib.Path(__file__).parent


def pytest_collection_modifyitems(items):
    rank = {TESTS / name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path, len(rank)))


def pytest_collection_finish():
    """Modules and tests stay until the end: the garbage collector need not visit them again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _quiet_libraries():
    """Warnings of Orbax are hidden, as in `cli.run`; tests of flags reset absl's verbosity."""
    logging.set_verbosity(logging.ERROR)


@pytest.fixture(autouse=True, scope="session")
def compilation_cache(tmp_path_factory):
    """Settings of JAX: one cache of compiled programs for all tests, and all workers of xdist."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    settings = compilation.cache_in(folder / "compiled")
    with compilation.configured(settings):
        yield settings


@pytest.fixture(autouse=True, scope="module")
def _compilation(request, compilation_cache):
    """Compiles as for users, or fast with the mark `fast_compile`.

    Loaded programs of one module are of no use to the next, and take gigabytes.
    """
    is_fast = request.node.get_closest_marker("fast_compile") is not None
    if not is_fast:
        jax.clear_caches()  # of what was compiled fast when the module was imported
    with compilation.compiling(fast=is_fast):
        yield
    jax.clear_caches()


@pytest.fixture
def compiled_fast(_compilation):
    """Compiles fast what one test runs: a variant of what others run as compiled for users."""
    with compilation.compiling(fast=True):
        yield
