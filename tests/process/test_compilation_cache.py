"""The user's folder of compiled programs: private, bounded, and harmless when it is damaged."""

import os
import pathlib
import shutil
import stat
import subprocess
import sys
import textwrap

import pytest
from compilation import configured
from processes import Processes

from esolm_jax.parallel import program_cache
from esolm_jax.process import compilation_cache
from esolm_jax.process.compilation_cache import ProgramCache

ROOT = str(pathlib.Path(__file__).parents[2])
WORKDIR = pathlib.Path(ROOT, "tests", "fixtures", "workdir_947f88e", "run")


def entries(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in folder.rglob("*-program"))


# The folder's entries.


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: b"", lambda data: data[:40]
                                    + bytes([data[40] ^ 1]) + data[41:]])  # fmt: skip
def test_a_damaged_entry_is_no_entry(tmp_path, damage):
    cache = ProgramCache(tmp_path, 1000)
    assert cache.get("a") is None
    cache.put("a", bytes(range(100)))
    assert cache.get("a") == bytes(range(100)) and cache.last_key == "a"
    (path,) = entries(tmp_path)
    path.write_bytes(damage(path.read_bytes()))
    assert cache.get("a") is None and not entries(tmp_path)
    cache.put("a", b"new")
    assert cache.get("a") == b"new"


def test_the_least_recently_used_entries_go_first(tmp_path):
    cache = ProgramCache(tmp_path, 400)
    (tmp_path / "xla_folder").mkdir()
    for number, key in enumerate("abc"):
        cache.put(key, bytes(90))
        os.utime(entries(tmp_path)[-1], (number, number))
    assert cache.get("a") == bytes(90)  # and is the most recent now
    cache.put("d", bytes(90))
    assert [cache.get(key) is not None for key in "abcd"] == [True, False, True, True]
    cache.put("large", bytes(401))
    assert cache.get("large") is None and len(entries(tmp_path)) == 3


def test_a_folder_that_is_gone_breaks_nothing(tmp_path):
    cache = ProgramCache(tmp_path / "gone", 1000)
    cache.put("a", b"value")
    assert cache.get("a") is None


# The choice of the folder.


@pytest.fixture
def without_setting():
    with configured({"jax_compilation_cache_dir": None}):
        os.environ.pop("JAX_COMPILATION_CACHE_DIR")
        yield
        os.environ["JAX_COMPILATION_CACHE_DIR"] = "restored by configured"


@pytest.fixture
def used(monkeypatch):
    """The folders that are put to use."""
    folders = []
    monkeypatch.setattr(compilation_cache, "use", folders.append)
    return folders


def test_it_is_private_and_in_the_users_cache(tmp_path, monkeypatch, without_setting, used):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    program_cache.keep_compiled_programs()
    (folder,) = used
    assert folder.parent == tmp_path / "esolm_jax" / "compiled"
    for path in (folder, folder.parent, folder.parent.parent):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    program_cache.keep_compiled_programs()
    assert used[1].parent == tmp_path / "home" / ".cache" / "esolm_jax" / "compiled"


def _for_all(folder):
    (folder / "esolm_jax" / "compiled").mkdir(parents=True)
    (folder / "esolm_jax" / "compiled").chmod(0o777)


def _a_file(folder):
    (folder / "esolm_jax").write_text("")


@pytest.mark.parametrize("spoil", [_for_all, _a_file])
def test_a_folder_of_no_use_costs_one_line(
    tmp_path, monkeypatch, without_setting, used, capsys, spoil
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    spoil(tmp_path)
    program_cache.keep_compiled_programs()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("note: compiled programs are not kept: ") and not used


@pytest.mark.parametrize(
    "setting", [{"jax_compilation_cache_dir": "elsewhere"}, {"jax_enable_compilation_cache": False}]
)
def test_a_setting_of_jax_wins(tmp_path, monkeypatch, used, setting):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with configured(setting):
        program_cache.keep_compiled_programs()
    assert not used and not list(tmp_path.iterdir())


@pytest.mark.parametrize("shared", [True, False])
def test_processes_use_one_folder_or_none(tmp_path, shared):
    script = f"""
    from esolm_jax.parallel import program_cache
    def body(index):
        import jax
        os.environ["XDG_CACHE_HOME"] = {str(tmp_path)!r} + ("" if {shared} else f"/{{index}}")
        program_cache.keep_compiled_programs()
        print(jax.config.jax_compilation_cache_dir or "")
    main(body)
    """
    folders = {"JAX_COMPILATION_CACHE_DIR": "", "JAX_ENABLE_COMPILATION_CACHE": "1"}
    found = Processes(script, **folders).wait()
    assert [code for code, _, _ in found] == [0, 0], found
    first, second = (out.strip() for _, out, _ in found)
    assert first == second
    assert first.startswith(str(tmp_path)) if shared else not first
    assert not [path for path in tmp_path.rglob("seen-*")]


# Verbs.


@pytest.fixture
def workdir(tmp_path):
    return shutil.copytree(WORKDIR, tmp_path / "run")


def sample(workdir, cache) -> str:
    """The texts, by a process of its own."""
    removed = ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR", "JAX_DISABLE_MOST_OPTIMIZATIONS")
    env = {name: value for name, value in os.environ.items() if name not in removed}
    done = subprocess.run(
        [sys.executable, "-m", "esolm_jax.sample", f"--workdir={workdir}"],
        env=env | {"PYTHONPATH": ROOT, "XDG_CACHE_HOME": str(cache)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0 and "compil" not in done.stderr, done.stderr
    return (workdir / "samples.jsonl").read_text()


def test_a_verb_keeps_its_programs_and_survives_their_loss(workdir, tmp_path):
    tmp_path = tmp_path / "cache"
    texts = sample(workdir, tmp_path)
    kept = entries(tmp_path)
    assert any("run_passes" in path.name for path in kept)
    for number, path in enumerate(kept):
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2] if number % 2 else data[:-1] + b"?")
    assert sample(workdir, tmp_path) == texts
    assert entries(tmp_path) == kept
    times = [path.stat().st_mtime_ns for path in kept]
    before = [path.read_bytes() for path in kept]
    assert sample(workdir, tmp_path) == texts
    assert [path.read_bytes() for path in entries(tmp_path)] == before
    assert times != [path.stat().st_mtime_ns for path in kept]  # they were read


# Programs that are known by their arguments.


def test_a_known_program_is_not_traced(tmp_path):
    script = """
    import dataclasses, pathlib, sys
    import flax.struct, jax, jax.numpy as jnp, numpy as np
    from esolm_jax.parallel import stored_programs
    from esolm_jax.process import compilation_cache

    @flax.struct.dataclass
    class Args:
        x: jax.Array
        power: int = flax.struct.field(pytree_node=False)

    traced = []
    def function(args):
        traced.append(args.power)
        return args.replace(x=args.x ** args.power)

    folder = pathlib.Path(sys.argv[1])
    compilation_cache.use(folder)
    def run(power, size=3, dtype=np.float32):
        jax.clear_caches()
        args = Args(np.arange(size, dtype=dtype), power)
        lower = jax.jit(function).lower
        done = stored_programs.compile_or_load("f", lower, (args,))(args)
        np.testing.assert_array_equal(done.x, args.x ** power)
        assert done.power == power
        return len(traced)

    assert [run(2), run(2), run(3), run(2), run(3)] == [1, 1, 2, 2, 2]
    assert [run(2, 4), run(2, 4), run(2, 4, np.int32), run(2, 4, np.int32)] == [3, 3, 4, 4]
    for path in folder.glob("jit_function-*"):  # the programs, not what names them
        path.unlink()
    assert [run(2), run(2)] == [5, 5]
    for path in folder.glob("call-*"):
        path.write_bytes(b"")
    assert [run(2), run(2)] == [6, 6]
    with_address = Args(np.zeros(1, np.float32), lambda: None)
    assert stored_programs._key("f", (with_address,), None) is None
    jax.config.update("jax_enable_compilation_cache", False)
    assert [run(2), run(2)] == [7, 8]
    """
    removed = ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")
    env = {name: value for name, value in os.environ.items() if name not in removed}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)],
        env=env | {"PYTHONPATH": ROOT},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
