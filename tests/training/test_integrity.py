"""Damaged checkpoints are detected; the next intact one is used, with a line on stderr."""

import hashlib
import json
import pathlib
import random
import shutil

import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny_run
from saved_steps import META, assert_same, make_state, shapes, steps_in, write

from esolm_jax.errors import UserError
from esolm_jax.files import hashing
from esolm_jax.interop.published import write as published_write
from esolm_jax.training import (
    checkpoint,
    checkpoint_digests,
    checkpoint_meta,
    checkpoint_reader,
    checkpoint_selection,
    checkpoint_steps,
)
from esolm_jax.training.checkpoint_digests import FILE as DIGESTS

pytestmark = pytest.mark.fast_compile

STEPS = {2: 4.0, 4: 3.0, 6: 5.0}
KEEP = {"keep_last": 3, "keep_best": 1}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    write(folder, STEPS, **KEEP)
    return folder


@pytest.fixture
def workdir(written, tmp_path):
    checkpoint_selection.forget_what_was_said()
    return pathlib.Path(shutil.copytree(written, tmp_path / "run"))


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def empty(path):
    path.write_bytes(b"")


def garbage(path):
    path.write_bytes(random.Random(0).randbytes(path.stat().st_size))


def delete(path):
    path.unlink()


def folder_instead(path):
    path.unlink()
    path.mkdir()


DAMAGES = [flip, truncate, empty, garbage, delete, folder_instead]


def files_of(workdir, step: int, *items: str) -> list[pathlib.Path]:
    """Of each folder of the items, the smallest and the largest file."""
    root = workdir / checkpoint_steps.FOLDER / str(step)
    chosen = set()
    for folder in {path.parent for item in items for path in (root / item).rglob("*")}:
        files = sorted((p for p in folder.iterdir() if p.is_file()), key=lambda p: p.stat().st_size)
        chosen |= {*files[:1], *files[-1:]}
    return sorted(chosen)


def read_ema(workdir, **kwargs):
    return checkpoint_reader.restore_weights(workdir, "ema", shapes(make_state(0).params), **kwargs)


@pytest.mark.parametrize("damage", DAMAGES)
def test_weights_are_those_of_the_next_older_step_or_right(workdir, written, damage, capsys):
    root = workdir / checkpoint_steps.FOLDER / "6"
    orbax = [] if damage is flip else [root / "_CHECKPOINT_METADATA"]  # one of its times is changed
    for path in [*files_of(workdir, 6, "ema", "meta"), *orbax]:
        damage(path)
        checkpoint_selection.forget_what_was_said()
        weights, step = read_ema(workdir)
        assert step == 4, path
        assert_same(weights, make_state(4).ema)
        (line,) = capsys.readouterr().err.splitlines()
        assert str(path) in line and "step 6 is damaged; using step 4 instead" in line
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        shutil.copy(written / path.relative_to(workdir), path)
    for path in files_of(workdir, 6, "params", "optimizer", "metrics")[::3]:
        damage(path)
    weights, step = read_ema(workdir)  # these are not read
    assert step == 6
    assert_same(weights, make_state(6).ema)
    assert capsys.readouterr().err == ""


def resume(workdir):
    checkpoints = checkpoint.Checkpoints(workdir, **KEEP)
    state, meta = checkpoints.restore(shapes(make_state(0)))
    return checkpoints, state, meta


@pytest.mark.parametrize("item", ["params", "ema", "optimizer", "meta", "metrics"])
@pytest.mark.parametrize("damage", [flip, delete])
def test_a_resumed_run_moves_damaged_steps_aside_and_saves_them_again(
    workdir, damage, item, capsys
):
    path = files_of(workdir, 6, item)[-1]
    damage(path)
    checkpoints, state, meta = resume(workdir)
    assert_same(state, make_state(4))
    assert meta == META | {"cursor": 40}
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and str(path) in said[0] and "using step 4 instead" in said[0]
    assert f"moved to {workdir}/damaged_checkpoints/6" in said[1]
    moved = workdir / "damaged_checkpoints" / path.relative_to(workdir / checkpoint_steps.FOLDER)
    assert moved.exists() == (damage is flip)
    checkpoints.save(make_state(6), META, nelbo=5.0)
    checkpoints.close()
    assert steps_in(workdir) == {2, 4, 6}
    weights, step = read_ema(workdir)
    assert step == 6
    assert_same(weights, make_state(6).ema)


def test_steps_that_are_damaged_twice_are_all_kept(workdir):
    for _ in range(2):
        flip(files_of(workdir, 6, "params")[-1])
        checkpoints, _, _ = resume(workdir)
        checkpoints.save(make_state(6), META)
        checkpoints.close()
    assert sorted(p.name for p in (workdir / "damaged_checkpoints").iterdir()) == ["6", "6.2"]


def test_an_older_step_with_damaged_metrics_is_moved_aside(workdir):
    empty(workdir / checkpoint_steps.FOLDER / "2" / "metrics" / "metrics")
    checkpoints, state, _ = resume(workdir)
    checkpoints.close()
    assert int(state.step) == 6
    assert steps_in(workdir) == {4, 6}
    assert (workdir / "damaged_checkpoints" / "2" / "params").is_dir()


def test_no_intact_step_is_one_error(workdir):
    for step in STEPS:
        flip(files_of(workdir, step, "ema")[-1])
    for read in (read_ema, resume):
        with pytest.raises(UserError, match="none of the checkpoints in .* is intact") as error:
            read(workdir)
        assert "\n" not in str(error.value) and str(workdir) in str(error.value)
    assert steps_in(workdir) == set(STEPS)


def test_a_missing_ema_is_never_the_raw_weights(workdir):
    for step in (4, 6):
        shutil.rmtree(workdir / checkpoint_steps.FOLDER / str(step) / "ema")
    weights, step = read_ema(workdir)
    assert step == 2
    assert_same(weights, make_state(2).ema)
    with pytest.raises(UserError, match="4/ema.*is missing.*step 4 is damaged"):
        read_ema(workdir, step="4")
    without_digests(workdir)
    with pytest.raises(UserError, match="4/ema: is missing.*step 4 is damaged"):
        read_ema(workdir, step="4")


def test_a_pretrained_model_has_one_set_of_weights(tmp_path):
    checkpoints = checkpoint.Checkpoints(tmp_path, **KEEP)
    params = {k: {n: np.asarray(a) for n, a in v.items()} for k, v in make_state(3).params.items()}
    checkpoints.save_weights(params, META | {"only_weights": True})
    checkpoints.close()
    assert_same(read_ema(tmp_path)[0], make_state(3).params)
    assert checkpoint_meta.digest_of(tmp_path, 0)


def without_digests(workdir) -> None:
    """As commit 947f88e wrote it."""
    for folder in (workdir / checkpoint_steps.FOLDER).iterdir():
        (folder / DIGESTS).unlink()
        path = folder / "_CHECKPOINT_METADATA"
        entry = json.loads(path.read_text())
        path.write_text(json.dumps(entry | {"custom_metadata": {}}))


def test_steps_without_digests_are_read_with_a_notice(workdir, capsys):
    without_digests(workdir)
    assert checkpoint_meta.digest_of(workdir, 6) is None
    weights, step = read_ema(workdir)
    assert step == 6
    assert_same(weights, make_state(6).ema)
    (line,) = capsys.readouterr().err.splitlines()
    assert "written without digests: cannot be verified" in line
    truncate(workdir / checkpoint_steps.FOLDER / "6" / "ema" / "_METADATA")
    assert read_ema(workdir)[1] == 4


@pytest.mark.parametrize("damage", [delete, empty, flip, garbage])
def test_damaged_digests_are_damage(workdir, damage):
    damage(workdir / checkpoint_steps.FOLDER / "6" / DIGESTS)
    assert read_ema(workdir)[1] == 4
    with pytest.raises(UserError, match="_DIGESTS.*step 6 is damaged"):
        checkpoint_meta.digest_of(workdir, 6)


def rehash(folder, algorithm: str) -> None:
    """As a version that hashed files with this algorithm wrote the step."""
    new = hashing.ALGORITHMS.get(algorithm, hashlib.sha256)
    entry = json.loads((folder / DIGESTS).read_text())
    for name, (size, _) in entry["files"].items():
        entry["files"][name] = [size, new((folder / name).read_bytes()).hexdigest()]
    listing = json.dumps(entry["files"], sort_keys=True).encode()
    entry |= {"algorithm": algorithm, "digest": hashlib.sha256(listing).hexdigest()}
    (folder / DIGESTS).write_text(json.dumps(entry))
    path = folder / "_CHECKPOINT_METADATA"
    entry = json.loads(path.read_text()) | {"custom_metadata": {"digests": algorithm}}
    path.write_text(json.dumps(entry))


def test_new_steps_have_xxh3_digests(workdir):
    entry = json.loads((workdir / checkpoint_steps.FOLDER / "6" / DIGESTS).read_text())
    assert entry["algorithm"] == "xxh3_128"
    rehash(workdir / checkpoint_steps.FOLDER / "6", "xxh3_128")
    assert json.loads((workdir / checkpoint_steps.FOLDER / "6" / DIGESTS).read_text()) == entry


@pytest.mark.parametrize("algorithm", hashing.ALGORITHMS)
def test_every_algorithm_is_verified(workdir, algorithm, capsys):
    for step in STEPS:
        rehash(workdir / checkpoint_steps.FOLDER / str(step), algorithm)
    weights, step = read_ema(workdir)
    assert step == 6
    assert_same(weights, make_state(6).ema)
    checkpoints, state, _ = resume(workdir)
    checkpoints.close()
    assert_same(state, make_state(6))
    assert capsys.readouterr().err == ""
    path = files_of(workdir, 6, "ema")[-1]
    flip(path)
    assert read_ema(workdir)[1] == 4
    assert f"{path}: content differs from its recorded digest" in capsys.readouterr().err


def test_an_unknown_algorithm_is_one_error(workdir):
    rehash(workdir / checkpoint_steps.FOLDER / "6", "blake9")
    for read in (read_ema, resume, lambda workdir: checkpoint_meta.digest_of(workdir, 6)):
        with pytest.raises(UserError, match="algorithm='blake9': must be one of sha256, xxh3_128"):
            read(workdir)
    assert steps_in(workdir) == set(STEPS)


def test_an_algorithm_that_contradicts_the_metadata_is_damage(workdir):
    path = workdir / checkpoint_steps.FOLDER / "6" / DIGESTS
    path.write_text(path.read_text().replace("xxh3_128", "xxh3_129"))
    assert read_ema(workdir)[1] == 4


def test_every_step_has_another_digest(workdir):
    assert len({checkpoint_meta.digest_of(workdir, step) for step in STEPS}) == 3
    entry = json.loads((workdir / checkpoint_steps.FOLDER / "6" / DIGESTS).read_text())
    there = {
        path for path in (workdir / checkpoint_steps.FOLDER / "6").glob("*/**/*") if path.is_file()
    }
    assert len(entry["files"]) == len(there)


def test_digests_are_there_before_the_step_has_its_name(tmp_path, monkeypatch):
    seen, write_them = [], checkpoint_digests.write

    def recorded(folder):
        seen.append((folder.name, (folder.parent / "3").exists()))
        write_them(folder)

    monkeypatch.setattr(checkpoint_digests, "write", recorded)
    write(tmp_path, {3: None})
    assert seen == [("3.orbax-checkpoint-tmp", False)]
    assert not list((tmp_path / checkpoint_steps.FOLDER).glob("*tmp*"))


# Saves that fail.


def test_a_save_that_is_refused_is_an_error(workdir):
    checkpoints = checkpoint.Checkpoints(workdir, **KEEP)
    with pytest.raises(UserError, match="5: was not saved: the newest step there is already 6"):
        checkpoints.save(make_state(5), META)
    checkpoints.close()


def test_an_asynchronous_save_that_failed_is_an_error(workdir, monkeypatch):
    def full(folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_digests, "write", full)
    checkpoints = checkpoint.Checkpoints(workdir, **KEEP)
    checkpoints.save(make_state(8), META)
    with pytest.raises(UserError, match="checkpoints/8: could not be saved: .*No space left"):
        checkpoints.close()
    assert checkpoint_steps.steps_in(workdir) == [2, 4, 6]
    assert read_ema(workdir)[1] == 6


# Which step is read.


def test_nan_ranks_last(tmp_path):
    write(tmp_path, dict(enumerate([5.0, 3.0, *[float("nan")] * 3], start=1)))
    assert steps_in(tmp_path) == {2, 4, 5}
    assert read_ema(tmp_path, step="best")[1] == 2


def test_steps_by_name(workdir):
    for wanted, step in (("latest", 6), ("best", 4), ("2", 2)):
        weights, found = read_ema(workdir, step=wanted)
        assert found == step
        assert_same(weights, make_state(step).ema)
        assert checkpoint_meta.read_meta(workdir, wanted)["cursor"] == 10 * step
    with pytest.raises(UserError, match="there is no step 5; steps there: 2, 4, 6"):
        read_ema(workdir, step="5")


def test_a_damaged_best_is_followed_by_the_second(workdir, capsys):
    flip(files_of(workdir, 4, "ema")[-1])
    assert read_ema(workdir, step="best")[1] == 2
    assert "step 4 is damaged; using step 2 instead" in capsys.readouterr().err
    flip(workdir / checkpoint_steps.FOLDER / "2" / "metrics" / "metrics")
    assert read_ema(workdir, step="best")[1] == 6


def test_no_best_without_a_metric(tmp_path):
    write(tmp_path, {1: None, 2: float("inf")})
    with pytest.raises(UserError, match="no step has a recorded validation NELBO.* 1, 2"):
        read_ema(tmp_path, step="best")


@pytest.mark.parametrize("step", ["", "-1", "1.5", "newest", "07", "١"])
def test_bad_names_of_steps(step):
    with pytest.raises(UserError, match="must be a step"):
        checkpoint_steps.split_source(f"runs/a@{step}")


def test_sources_with_steps(tmp_path):
    (tmp_path / "a@b").mkdir()
    for source, wanted in {
        "runs/a": ("runs/a", "latest"),
        "runs/a@12": ("runs/a", "12"),
        "x@y/a": ("x@y/a", "latest"),
        f"{tmp_path}/a@b": (f"{tmp_path}/a@b", "latest"),
        f"{tmp_path}/a@b@best": (f"{tmp_path}/a@b", "best"),
    }.items():
        folder, step = checkpoint_steps.split_source(source)
        assert (str(folder), step) == wanted


def test_a_step_that_is_deleted_while_it_is_read_is_no_damage(workdir, monkeypatch, capsys):
    restore = ocp.StandardCheckpointHandler.restore
    deleted = []

    def deleting(self, directory, *args, **kwargs):
        if not deleted:  # what a writer does: a newer step is there, then the old one is deleted
            deleted.append(6)
            root = workdir / checkpoint_steps.FOLDER
            shutil.copytree(root / "6", root / "8")
            shutil.rmtree(root / "6")
        return restore(self, directory, *args, **kwargs)

    monkeypatch.setattr(ocp.StandardCheckpointHandler, "restore", deleting)
    weights, step = read_ema(workdir)
    assert (step, deleted) == (8, [6])
    assert_same(weights, make_state(6).ema)
    assert capsys.readouterr().err == ""


def test_a_named_step_that_vanishes_is_one_error(workdir, monkeypatch):
    def vanishing(self, directory, *args, **kwargs):
        shutil.rmtree(workdir / checkpoint_steps.FOLDER / "4", ignore_errors=True)
        raise FileNotFoundError(directory)

    monkeypatch.setattr(ocp.StandardCheckpointHandler, "restore", vanishing)
    with pytest.raises(UserError, match="there is no step 4; steps there: 2, 6"):
        read_ema(workdir, step="4")


# The verbs.


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    fields = tiny_run.write_text(folder / "text") | {"objective": "ar", "train.eval_every": 4}
    args = [f"--config={tiny_run.FILE}", *tiny_run.arguments(fields)]
    for verb in ("prepare", "train"):
        assert tiny_run.command(verb, f"--workdir={folder / 'run'}", *args) == 0
    yield folder / "run", args


@pytest.fixture
def run(trained, tmp_path, capsys):
    """(a copy of the workdir, command(verb, *more) -> (code, lines on stderr))."""
    folder = shutil.copytree(trained[0], tmp_path / "run")
    capsys.readouterr()

    def command(verb, *more):
        given = [*trained[1], "--config.train.steps=6"] if verb == "train" else []
        code = tiny_run.command(verb, f"--workdir={folder}", *given, *more)
        lines = capsys.readouterr().err.splitlines()
        return code, [line for line in lines if str(folder) in line or "error" in line]

    return pathlib.Path(folder), command


@pytest.mark.parametrize("verb", ["evaluate", "sample", "train"])
def test_verbs_fall_back_and_say_so(run, verb):
    folder, command = run
    flip(files_of(folder, 4, "ema")[-1])
    code, said = command(verb)
    assert code == 0
    assert "step 4 is damaged; using step 2 instead" in said[0]
    assert len(said) == (2 if verb == "train" else 1)
    if verb == "evaluate":
        assert json.loads((folder / "evaluate.json").read_text())["step"] == 2


@pytest.mark.parametrize("verb", ["evaluate", "sample"])
def test_verbs_end_with_one_line_where_nothing_is_intact(run, verb):
    folder, command = run
    for step in (2, 4):
        delete(files_of(folder, step, "ema")[-1])
    code, said = command(verb)
    assert code == 2 and len(said) == 1 and "is intact" in said[0]
    code, said = command(verb, "--step=4")
    assert code == 2 and len(said) == 1 and "step 4 is damaged" in said[0]


def test_evaluate_of_a_named_step(run):
    folder, command = run
    assert command("evaluate", "--step=2") == (0, [])
    assert json.loads((folder / "evaluate.json").read_text())["step"] == 2
    code, said = command("evaluate", "--step=3")
    assert code == 2 and "there is no step 3; steps there: 2, 4" in said[0]
    code, said = command("evaluate", "--step=newest")
    assert code == 2 and said == ["error: --step=newest: must be a step (a number), best or latest"]


@pytest.mark.parametrize("damage", [garbage, delete, folder_instead])
def test_sample_with_a_damaged_tokenizer(run, damage):
    folder, command = run
    path = folder / "tokenizer" / "tokenizer.bytes"
    damage(path)
    code, said = command("sample")
    assert (code, said) == (0, []) if damage is garbage else (code == 2 and len(said) == 1)


def test_verify_of_a_workdir(run):
    folder, command = run
    assert command("evaluate", "--verify") == (0, [])
    for name in ("checkpoints/2/optimizer/_METADATA", "data/train-00000.array_record"):
        path = folder / name
        good = path.read_bytes()
        path.write_bytes(good.replace(good[64:80], bytes(16)))
        code, said = command("verify")
        assert code == 2 and "1 of 9 parts are damaged" in said[-1]
        path.write_bytes(good)
    flip(folder / "metrics.jsonl")
    code, said = command("evaluate", "--verify")
    assert code == 2 and "1 of 9 parts are damaged" in said[-1]
    shutil.rmtree(folder / "checkpoints" / "4")
    shutil.rmtree(folder / "checkpoints" / "2")
    assert command("verify")[0] == 2  # it needs no config


def test_exports_are_of_the_named_step(run):
    folder, _ = run
    config = checkpoint_meta.saved_config(folder)
    for wanted, step in (("best", 4), ("2", 2)):
        assert published_write.load(config, folder, "ema", wanted).step == step
    with pytest.raises(UserError, match="there is no step 3"):
        published_write.load(config, folder, "ema", "3")


def test_a_config_of_another_step_than_the_weights_is_refused(run):
    """The settings were changed when training was resumed, and then the newest step was damaged."""
    folder, command = run
    assert command("train", "--config.eval.num_samples=3")[0] == 0
    assert command("evaluate") == (0, [])
    flip(files_of(folder, 6, "ema")[-1])
    code, said = command("evaluate")
    assert code == 2 and "config.eval.num_samples=2, not 3" in said[-1] and "--step=N" in said[-1]
    assert command("evaluate", "--step=4") == (0, [])


def test_init_from_a_step(run, trained, tmp_path, capsys):
    folder, _ = run
    for step, found in (("best", 4), ("2", 2)):
        source = f"--config.init_from={folder}@{step}"
        more = [f"--config.data.dir={folder / 'data'}", "--config.train.steps=1"]
        workdir = f"--workdir={tmp_path / step}"
        assert tiny_run.command("train", workdir, *trained[1], *more, source) == 0
        assert f"initial weights: {folder} at step {found}" in capsys.readouterr().out
    flip(files_of(folder, 4, "ema")[-1])
    source = f"--config.init_from={folder}@4"
    assert tiny_run.command("train", f"--workdir={tmp_path / 'c'}", *trained[1], *more, source) == 2
    assert "step 4 is damaged" in capsys.readouterr().err.splitlines()[-1]
