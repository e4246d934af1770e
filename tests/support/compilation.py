"""How XLA compiles the programs of a test module: as for users, or fast and without optimizations.

Numbers are checked on programs compiled as for users: that is the default. The module-level mark
`fast_compile` is for the others, whose programs finish sooner than they compile; what a module
computes when it is imported (inputs) is compiled fast, too. In other modules, `compiling` is for
interpreted kernels, which users do not run, for expected values, and for programs that run for less
time than they compile, if other tests run them as compiled for users.
Either way no program is compiled twice: one cache on disk serves all tests of a run, its workers
and the processes that tests start.
"""

import contextlib
import os
import pathlib

import jax
import thorough
from jax._src import compiler  # its options of one compilation have no public setting

# XLA's emitters of fusions take most of the time to compile; from jax 0.11 on there are no others.
_OTHER_EMITTERS = {"xla_cpu_use_fusion_emitters": False} if jax.__version_info__ < (0, 11) else {}
FAST_SETTING = "jax_disable_most_optimizations"
FAST_ENVIRONMENT = {  # of a process of its own
    FAST_SETTING.upper(): "1",
    "XLA_FLAGS": " ".join(f"--{name}=false" for name in _OTHER_EMITTERS),
}


def cache_in(folder: pathlib.Path) -> dict:
    """Settings of JAX that keep compiled programs in the folder."""
    return {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.0,  # one operation: 4 times a load
        "jax_persistent_cache_min_entry_size_bytes": 0,
    }


def as_environment(settings: dict) -> dict[str, str]:
    """The same settings as environment variables."""
    return {name.upper(): str(value) for name, value in settings.items()}


@contextlib.contextmanager
def configured(settings: dict):
    """Applies settings of JAX, in this process and in the processes that it starts."""
    before = {name: jax.config.values[name] for name in settings}
    outside = {name: os.environ.get(name) for name in as_environment(settings)}
    for name, value in settings.items():
        jax.config.update(name, value)
    os.environ |= as_environment(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        for name, value in outside.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


@contextlib.contextmanager
def compiling(*, fast: bool):
    """Compiles fast or as for users, in this process and in the processes that it starts. With
    ESOLM_TEST_ALL=1 all is compiled as for users."""
    fast = fast and not thorough.ALL
    flags = os.environ["XLA_FLAGS"]  # this process has read them
    os.environ["XLA_FLAGS"] = " ".join([flags, *[FAST_ENVIRONMENT["XLA_FLAGS"]] * fast]).strip()
    try:
        with configured({FAST_SETTING: fast}):
            yield
    finally:
        os.environ["XLA_FLAGS"] = flags


def install() -> None:
    """While FAST_SETTING is on, XLA on a CPU compiles without the emitters that take long."""
    jax.devices()  # XLA reads XLA_FLAGS now
    get_options = compiler.get_compile_options

    def fast_options(*args, backend=None, **kwargs):
        options = get_options(*args, backend=backend, **kwargs)
        if jax.config.values[FAST_SETTING] and getattr(backend, "platform", "cpu") == "cpu":
            options.env_option_overrides += list(_OTHER_EMITTERS.items())
        return options

    compiler.get_compile_options = fast_options
