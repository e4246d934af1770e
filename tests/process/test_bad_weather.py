"""Verbs from outside: the printed next command can be run, and a full disk is one line."""

import contextlib
import io
import json
import pathlib
import re
import resource
import shlex
import shutil

import pytest
import tiny_run
from compilation import configured
from tiny_run import FILE, arguments, command

from esolm_jax import cli
from esolm_jax.parallel import distributed, sharding

pytestmark = pytest.mark.fast_compile


def run(line: str) -> int:
    """Runs a printed command line in this process."""
    python, dash_m, module, *args = shlex.split(line)
    assert (python, dash_m) == ("python", "-m")
    return command(module.removeprefix("esolm_jax."), *args)


def next_of(out: str, verb: str) -> str:
    """The next command that was printed, which is of this verb."""
    (line,) = re.findall(r"^next: (.*)$", out, re.MULTILINE)
    assert line.startswith(f"python -m esolm_jax.{verb} ")
    return line


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Arguments, and a workdir whose name has to be quoted, on two devices of a sequence axis."""
    folder = tmp_path_factory.mktemp("weather")
    workdir = folder / "it's a run é"
    text = tiny_run.write_text(folder / "text") | {"train.steps": 2, "objective": "mdlm"}
    args = ["--config", FILE, *arguments(text), "--noconfig.low_variance"]
    args += [
        "--config.mesh.devices",
        "4",
        "--config.mesh.sequence=2",
        "--config.sample.num_texts",
        "6",
    ]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert command("prepare", "--workdir", str(workdir), *args) == 0
    line = next_of(out.getvalue(), "train")
    for word in ("--noconfig.low_variance", "--config.mesh.devices=4", f"--config={FILE}"):
        assert word in shlex.split(line)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert run(line) == 0
    return args, workdir, next_of(out.getvalue(), "evaluate")


def test_every_printed_command_can_be_run(trained, capsys):
    def printed(verb):
        return next_of(capsys.readouterr().out, verb)

    _, workdir, evaluate = trained
    saved = json.loads((workdir / "config.json").read_text())
    assert saved["mesh"]["devices"] == 4 and saved["sample"]["num_texts"] == 6
    assert run(evaluate) == 0
    line = printed("sample")
    assert "--config.mesh.sequence=1" in line  # sampling splits no text
    assert "--config.sample.num_texts=8" in line  # 4 devices, whole texts on each
    assert run(f"{line} --prompt='to be' --prompt 'it'\\''s' --config.sample.top_k 3") == 0
    again = shlex.split(printed("sample"))
    assert again.count("--prompt=to be") == again.count("--prompt=it's") == 1
    for flag in ("--config.sample.top_k=3", "--config.sample.seed=1", f"--workdir={workdir}"):
        assert flag in again
    assert run(shlex.join(again)) == 0
    assert json.loads((workdir / "samples.json").read_text())["sample"]["seed"] == 1
    assert "--config.sample.seed=2" in printed("sample")


def test_convert_prints_the_way_back(trained, tmp_path, capsys, monkeypatch):
    _, workdir, _ = trained
    monkeypatch.chdir(tmp_path)
    assert command("convert", f"--workdir={workdir}", f"--to={tmp_path}/a b.safetensors") == 0
    (line,) = re.findall(r"^to convert it back: (.*)$", capsys.readouterr().out, re.MULTILINE)
    assert run(line) == 0
    assert (tmp_path / "NEW" / "checkpoints").is_dir()
    assert "--workdir=NEW" in next_of(capsys.readouterr().out, "sample")


def test_after_several_processes_the_next_command_is_for_one(monkeypatch):
    config = tiny_run.get_config()
    config.mesh.devices, config.mesh.fsdp, config.sample.num_texts = 0, 2, 3
    mesh = sharding.make_mesh(config.mesh)
    assert cli.mesh_flags(config, mesh) == []
    assert cli.mesh_flags(config, mesh, sampling=True) == ["--config.sample.num_texts=8"]
    monkeypatch.setattr(distributed, "process_count", lambda: 2)
    flags = ["--config.mesh.fsdp=1", "--config.mesh.devices=1"]
    assert cli.mesh_flags(config, mesh) == cli.mesh_flags(config, mesh, sampling=True) == flags


# A full disk.


@contextlib.contextmanager
def files_of_at_most(size: int):
    """Writing more to a file fails with an error, as on a full disk. The tests' cache of compiled
    programs keeps none: cut off, they would be compiled again in every other test."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with configured({"jax_persistent_cache_min_compile_time_secs": 1e9}):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def files(folder: pathlib.Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "tensorboard" not in path.parts
    }


def fails_in_one_line(capsys, verb: str, *args) -> str:
    """Runs the verb with small files; the line that says why it failed."""
    capsys.readouterr()
    with files_of_at_most(200):
        code = command(verb, *args)
    err = capsys.readouterr().err
    assert code == 74, err
    assert "Traceback" not in err
    (line,) = (line for line in err.splitlines() if line.startswith("error: "))
    assert "File too large" in line
    return line


@pytest.mark.parametrize("verb", ["train", "evaluate", "sample", "convert", "prepare"])
def test_a_full_disk_damages_nothing_and_the_same_command_works_later(
    trained, tmp_path, capsys, verb
):
    args, original, _ = trained
    workdir = tmp_path / "run"
    if verb != "prepare":
        shutil.copytree(original, workdir)
        before = files(workdir)
    own = {
        "train": [*args, "--config.train.steps=4"],
        "prepare": args,
        "convert": [f"--to={tmp_path / 'out.safetensors'}"],
    }.get(verb, ["--config.mesh.sequence=1", "--config.sample.num_texts=8"])
    line = fails_in_one_line(capsys, verb, f"--workdir={workdir}", *own)
    assert str(tmp_path) in line
    if verb != "prepare":
        kept = files(workdir)
        for name in before.keys() - {"metrics.jsonl", "config.json"}:
            assert kept[name] == before[name], name
    assert command(verb, f"--workdir={workdir}", *own) == 0


@pytest.mark.parametrize("folder", ["/dev/null/run", "/proc/run", "a" * 300])
@pytest.mark.parametrize("verb", ["prepare", "train"])
def test_a_workdir_that_cannot_be_made(trained, capsys, verb, folder):
    args, original, _ = trained
    data = [f"--config.data.dir={original / 'data'}"] if verb == "train" else []
    code = command(verb, f"--workdir={folder}", *args, *data)
    (line,) = re.findall("^error: .*$", capsys.readouterr().err, re.MULTILINE)
    assert code in (2, 74) and folder in line
