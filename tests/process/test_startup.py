"""What a verb does before it imports anything large; streams, signals and printed commands."""

import os
import pathlib
import re
import signal
import subprocess
import sys
import textwrap

import pytest

ROOT = pathlib.Path(__file__).parents[2]


def start(code: str, *, path: str = "", **kwargs) -> subprocess.Popen:
    """A process that has begun as a verb does, and imports no JAX."""
    code = "from esolm_jax.process import startup\nstartup.begin()\n" + textwrap.dedent(code)
    return launch(["-c", code], path=path, **kwargs)


def launch(args, *, path: str = "", env=(), **kwargs) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": f"{path}{os.pathsep}{ROOT}"} | dict(env)
    environment.pop("XLA_FLAGS", None) if "XLA_FLAGS" not in dict(env) else None
    kwargs = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | kwargs
    # A background job of a shell, as this may be, ignores SIGINT.
    kwargs.setdefault("preexec_fn", lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    return subprocess.Popen([sys.executable, *args], env=environment, cwd=ROOT, **kwargs)


def ended(process: subprocess.Popen) -> tuple[int, str, str]:
    """Exit code, stdout and stderr, without what the GPU compiler says about a missing driver."""
    out, err = process.communicate(timeout=100)
    lines = (err or b"").decode().splitlines(keepends=True)
    lines = [line for line in lines if not re.search("absl::InitializeLog|cudart_stub", line)]
    return process.returncode, (out or b"").decode(), "".join(lines)


@pytest.fixture
def fake_jax(tmp_path):
    """A `jax` to be imported first, with this code."""

    def write(code):
        (tmp_path / "jax").mkdir()
        (tmp_path / "jax" / "__init__.py").write_text(textwrap.dedent(code))
        return str(tmp_path)

    return write


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_modules_are_imported(fake_jax, number):
    path = fake_jax(f"import os, time\nos.kill(os.getpid(), {int(number)})\ntime.sleep(60)")
    code, out, err = ended(launch(["-m", "esolm_jax.evaluate", "--workdir=none"], path=path))
    assert (code, out) == (128 + number, "")
    (line,) = err.splitlines()
    assert line.startswith("error: ") and number.name in line


def test_a_value_in_the_environment_that_jax_refuses():
    verb = ["-m", "esolm_jax.evaluate", "--workdir=none"]
    code, out, err = ended(launch(verb, env={"JAX_ENABLE_X64": "maybe"}))
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith("error: environment: ") and "JAX_ENABLE_X64" in line


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("--xla_cpu_unknown=1", "Unknown flag in XLA_FLAGS: --xla_cpu_unknown=1"),
        ("--xla_force_host_platform_device_count=many", "many"),
        ("/no/such/file", "Could not open file"),
    ],
)
def test_xla_flags_that_xla_refuses(given, told):
    code, out, err = ended(launch(["-m", "esolm_jax.evaluate"], env={"XLA_FLAGS": given}))
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith(f"error: XLA_FLAGS={given}: ") and told in line


def test_the_package_as_a_library_changes_no_stream_and_no_handler():
    code = "import sys, signal; a = sys.stdout, sys.excepthook, signal.getsignal(2); "
    code += "import esolm_jax; assert a == (sys.stdout, sys.excepthook, signal.getsignal(2))"
    assert ended(launch(["-c", code])) == (0, "", "")


# Signals.


def test_a_signal_while_the_main_thread_is_in_a_long_call():
    # As XLA's compiler does, this holds the main thread for minutes, and not Python's lock.
    process = start("""
        import hashlib
        print("ready", flush=True)
        hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
    """)
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    code, _, err = ended(process)
    assert code == 130 and err.strip().startswith("error: interrupted (SIGINT)")


def test_a_signal_where_python_drops_exceptions():
    process = start("""
        import os, signal, time
        class Dropped:
            def __del__(self):
                os.kill(os.getpid(), signal.SIGINT)
                for _ in range(1000): pass
        Dropped()
        time.sleep(60)
    """)
    code, _, err = ended(process)
    (line,) = err.splitlines()
    assert code == 130 and line.startswith("error: interrupted (SIGINT)")


def test_a_signal_whose_exception_is_caught():
    process = start("""
        import os, signal, time
        from esolm_jax.process import interrupts
        interrupts._LEAVE = 1.5  # not ten seconds, to wait less
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)
        except KeyboardInterrupt:
            time.sleep(60)
    """)
    code, _, err = ended(process)
    assert code == 130 and err.strip().startswith("error: interrupted (SIGINT)")


def test_a_run_that_handles_signals_itself_is_ended_by_a_second_one_alone():
    # The run is told once: two signals at once are one, as `timeout` sends them.
    process = start("""
        import hashlib, signal
        signal.signal(signal.SIGTERM, lambda number, frame: None)
        print("ready", flush=True)
        hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
    """)
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    assert process.stderr.readline() == b"\n"
    assert process.stderr.readline().startswith(b"stopping after this step")
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=1)
    process.send_signal(signal.SIGTERM)
    code, _, err = ended(process)
    assert code == 143 and err.strip().startswith("error: terminated (SIGTERM)")


def test_an_ignored_signal_stays_ignored():
    process = start(
        "import signal; print(signal.getsignal(signal.SIGINT) is signal.SIG_IGN)",
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    assert ended(process) == (0, "True\n", "")


# Streams.


def test_a_reader_that_leaves_does_not_stop_the_work(tmp_path):
    process = start(f"""
        import pathlib, sys
        sys.stdin.read()
        print("text " * 100_000, flush=True)
        print("more", file=sys.stderr, flush=True)
        pathlib.Path({str(tmp_path / "result")!r}).write_text("whole")
    """, stdin=subprocess.PIPE)  # fmt: skip
    process.stdout.close()
    process.stderr.close()
    process.stdin.close()
    assert process.wait(timeout=100) == 0
    assert (tmp_path / "result").read_text() == "whole"


def test_closed_streams_are_not_given_to_the_files_that_are_opened_next(tmp_path):
    code = f"""
        import os, sys
        with open({str(tmp_path / "result")!r}, "w") as file:
            print("text"), print("log", file=sys.stderr), os.write(1, b"log"), os.write(2, b"log")
            file.write("whole")
    """
    process = start(code, preexec_fn=lambda: [os.close(n) for n in (0, 1, 2)])
    assert process.wait(timeout=100) == 0
    assert (tmp_path / "result").read_text() == "whole"


def test_standard_output_on_a_full_disk_is_said_after_the_results_are_written(tmp_path):
    process = start(f"""
        import pathlib, sys
        from esolm_jax.process import standard_streams
        print("text", flush=True)
        pathlib.Path({str(tmp_path / "result")!r}).write_text("whole")
        print(standard_streams.failures, file=sys.stderr)
    """, stdout=open("/dev/full", "w"))  # fmt: skip
    code, _, err = ended(process)
    assert code == 0 and "No space left" in err
    assert (tmp_path / "result").read_text() == "whole"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_what_cannot_be_encoded_is_escaped(encoding):
    process = start(r'print("α₀ ë \udce9 \ud800")', env={"PYTHONIOENCODING": encoding})
    out, err = process.communicate(timeout=100)
    assert (process.returncode, err) == (0, b"")
    alpha, e, byte, surrogate = out.split()
    assert alpha.decode(encoding) in ("α₀", r"\u03b1\u2080")
    assert e.decode(encoding) in ("ë", r"\xeb")
    assert (byte, surrogate) == (b"\xe9", rb"\ud800")  # a byte of a file's name; no text at all


def test_a_failed_thread_is_one_line():
    code, _, err = ended(start("""
        import threading
        def fail():
            raise OSError(28, "No space left on device", "/d/f")
        thread = threading.Thread(target=fail)
        thread.start()
        thread.join()
        assert len(startup.thread_errors) == 1
    """))  # fmt: skip
    assert code == 0
    assert err.splitlines() == [
        "error: /d/f: No space left on device; free some room there and run the same command again"
    ]
