"""Each known kind of failure is one line and an exit code; an unknown one is called an error."""

import errno
import os
import signal
import threading

import jax
import pytest
from tqdm import tqdm

from esolm_jax.errors import UserError
from esolm_jax.parallel import peers
from esolm_jax.process import failures, interrupts

# What Orbax raises when tensorstore cannot write.
TENSORSTORE = (
    'RESOURCE_EXHAUSTED: Error writing "logits.bias/0" in OCDBT database at local file '
    '"/runs/a/checkpoints/6.orbax-checkpoint-tmp/": Failed to write 2171 bytes to file 13: No '
    "space left on device [os_error_code='28']"
)


def raised_from(error, cause):
    error.__cause__ = cause
    return error


KNOWN = {
    "bad input": (UserError("config.x=1: must be 2"), 2, "config.x=1: must be 2"),
    "full disk": (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/d/f"), 74, "/d/f: No space"),
    "full disk, no name": (OSError(errno.ENOSPC, "full"), 74, "--workdir=runs/a: full; free some"),
    "tensorstore": (ValueError(TENSORSTORE), 74, "/runs/a/checkpoints/6.orbax-checkpoint-tmp/: No"),
    "quota": (OSError(errno.EDQUOT, "Disk quota exceeded", "/d/f"), 74, "/d/f: Disk quota"),
    "read-only": (OSError(errno.EROFS, "Read-only file system", "/d"), 74, "a writable folder"),
    "permission": (PermissionError(errno.EACCES, "Permission denied", b"/d/f"), 74, "/d/f: Perm"),
    "too long": (OSError(errno.ENAMETOOLONG, "File name too long", "/d"), 74, "a shorter path"),
    "memory": (MemoryError(), 71, "out of memory; lower config.train.batch_size"),
    "device memory": (
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes."),
        71,
        "Out of memory allocating 9 bytes.; lower config.train.batch_size",
    ),
    "no such platform": (
        RuntimeError("Unable to initialize backend 'tpu': no TPU (set JAX_PLATFORMS='' to …)"),
        2,
        "JAX_PLATFORMS=tpu: Unable to initialize backend 'tpu'",
    ),
    "environment": (
        ValueError("invalid truth value 'maybe' for environment 'JAX_ENABLE_X64'"),
        2,
        "environment: invalid truth value 'maybe'",
    ),
    "warnings as errors": (DeprecationWarning("old"), 2, "must not be errors: DeprecationWarning"),
    "not installed": (
        ModuleNotFoundError("No module named 'onnx'", name="onnx"),
        2,
        "package onnx: No module named 'onnx'; pip install -e '.[export]'",
    ),
    "nan": (
        FloatingPointError("invalid value (nan) encountered in jit(step)"),
        1,
        "JAX_DEBUG_NANS",
    ),
    "interrupted": (KeyboardInterrupt(), 130, "interrupted (SIGINT)"),
    "terminated": (interrupts.Interrupted(signal.SIGTERM), 143, "terminated (SIGTERM)"),
    "wrapped": (
        raised_from(RuntimeError("save"), OSError(errno.ENOSPC, "full", "/d")),
        74,
        "/d: f",
    ),
    "group": (ExceptionGroup("tasks", [OSError(errno.EROFS, "read-only", "/d")]), 74, "/d: read"),
}


@pytest.mark.parametrize("kind", KNOWN)
def test_a_known_failure_is_one_line(monkeypatch, kind, capsys):
    error, code, told = KNOWN[kind]
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    assert failures.report(error, "--workdir=runs/a") == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and told in line


def test_what_fails_while_a_verb_is_interrupted_does_not_hide_the_interrupt():
    with pytest.raises(OSError) as caught:
        try:
            raise KeyboardInterrupt
        finally:
            raise OSError(errno.ENOSPC, "full")
    assert failures.describe(caught.value).code == 130


def test_an_unknown_failure_keeps_its_traceback_and_says_what_to_do(capsys):
    try:
        [][0]
    except IndexError as error:
        # What was handled before is not the reason.
        error.__context__ = OSError(errno.ENOSPC, "full")
        assert failures.report(error) == 1
    first, *rest = capsys.readouterr().err.splitlines()
    assert first.startswith("error: IndexError: list index out of range; this is an error in esolm")
    assert "Traceback (most recent call last):" in rest
    missing = ModuleNotFoundError("No module named 'esolm_jax.x'", name="esolm_jax.x")
    assert failures.describe(missing).is_bug


def test_tracebacks_of_known_failures_on_request(monkeypatch, capsys):
    monkeypatch.setenv("ESOLM_TRACEBACK", "1")
    assert failures.report(raised_from(RuntimeError("a"), MemoryError())) == 71
    assert "Traceback" not in capsys.readouterr().err.splitlines()[0]


def test_jax_asserts_that_there_is_a_platform(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    code = compile("assert False", "/site-packages/jax/_src/xla_bridge.py", "exec")
    with pytest.raises(AssertionError) as caught:
        exec(code)
    failure = failures.describe(caught.value)
    assert failure.line.startswith("JAX_PLATFORMS=cuda: no device") and failure.code == 2


def test_a_line_of_a_thread_does_not_continue_a_progress_bar(capsys, monkeypatch):
    """As printed when a peer is lost: the main thread is inside the bar, which stays open."""
    monkeypatch.setattr(peers, "_said", threading.Lock())
    with tqdm(total=2, disable=False) as bar:
        bar.update()
        peers.say("a peer is gone")
        assert "error: a peer is gone" in capsys.readouterr().err.split("\n")
    capsys.readouterr()
    monkeypatch.setattr(peers, "_said", threading.Lock())
    peers.say("a peer is gone")
    assert capsys.readouterr().err.startswith("error: a peer is gone")
