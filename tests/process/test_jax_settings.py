"""Settings of JAX in a user's environment: the same numbers, or one clear line."""

import json
import shutil

import jax
import numpy as np
import pytest
import tiny_run
from compilation import configured
from tiny_run import FILE, arguments, command

from esolm_jax.errors import UserError
from esolm_jax.process import jax_settings, prng
from esolm_jax.training import checkpoint_meta

pytestmark = pytest.mark.fast_compile  # all verbs, once with each set of settings

# Under each of these a seed meant other numbers, or a verb ended with a traceback.
SETTINGS = {
    "jax_default_prng_impl": "rbg",
    "jax_threefry_partitionable": False,
    "jax_random_seed_offset": 5,
    "jax_enable_x64": True,
    "jax_numpy_dtype_promotion": "strict",
    "jax_high_dynamic_range_gumbel": True,
    "jax_legacy_prng_key": "error",
    "jax_enable_custom_prng": True,
}


def settings_of_a_person(name):
    return configured({name: SETTINGS[name]})


@pytest.fixture(scope="module")
def args(tmp_path_factory):
    made = tiny_run.write_data(tmp_path_factory.mktemp("data"), objective="mdlm")
    return [f"--config={FILE}", *arguments(made | {"model.dropout": 0.1})]


@pytest.fixture(scope="module")
def halfway(args, tmp_path_factory):
    """A workdir whose run of 4 steps was stopped after 2."""
    workdir = tmp_path_factory.mktemp("halfway") / "run"
    assert command("train", f"--workdir={workdir}", *args, "--config.train.steps=2") == 0
    return workdir


def go_on(halfway, args, workdir) -> dict:
    """Resumes a copy, evaluates and samples it; what was computed."""
    shutil.copytree(halfway, workdir)
    flag = f"--workdir={workdir}"
    assert command("train", flag, *args) == 0
    assert command("evaluate", flag) == 0
    assert command("sample", flag, "--config.sample.num_texts=3") == 0
    texts = [json.loads(line) for line in (workdir / "samples.jsonl").read_text().splitlines()]
    # A text is the same without its neighbours in the batch.
    assert command("sample", flag, "--config.sample.num_texts=1") == 0
    (alone,) = (json.loads(line) for line in (workdir / "samples.jsonl").read_text().splitlines())
    assert alone["token_ids"] == texts[0]["token_ids"]
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    metrics = [json.loads(line) for line in lines]
    for entry in metrics:
        for of_the_clock in ("timing", "crc32"):
            entry.pop(of_the_clock, None)
    evaluation = json.loads((workdir / "evaluate.json").read_text())
    return {"texts": texts, "metrics": metrics, "evaluation": evaluation["results"]}


@pytest.fixture(scope="module")
def plain(halfway, args, tmp_path_factory):
    return go_on(halfway, args, tmp_path_factory.mktemp("plain") / "run")


def test_the_same_numbers_whatever_the_settings(halfway, args, plain, tmp_path):
    with configured(SETTINGS):
        assert go_on(halfway, args, tmp_path / "run") == plain
        for name, value in SETTINGS.items():
            assert jax.config.values[name] == value  # the person's again


def test_a_text_does_not_depend_on_the_generator_that_jax_defaults_to():
    draws = []
    for impl in ("threefry2x32", "rbg", "unsafe_rbg"):
        with configured({"jax_default_prng_impl": impl}):
            draws.append(jax.random.key_data(jax.random.split(prng.key(7), 3)))
    for draw in draws[1:]:
        np.testing.assert_array_equal(draw, draws[0])


@pytest.mark.parametrize("name", prng.REQUIRED)
def test_library_calls_refuse_settings_that_change_what_a_seed_means(name):
    with settings_of_a_person(name), pytest.raises(UserError, match=f"{name}=.*must be"):
        prng.key(0)


def test_keys_of_another_generator_are_refused():
    want = jax.random.key_data(prng.key(7))
    for same in (7, np.int64(7), jax.random.key(7), jax.random.PRNGKey(7)):
        np.testing.assert_array_equal(jax.random.key_data(prng.as_key(same, "rng")), want)
    for other in (jax.random.key(7, impl="rbg"), jax.random.PRNGKey(7, impl="rbg")):
        with pytest.raises(UserError, match="rng: must be a key of 'threefry2x32'"):
            prng.as_key(other, "rng")


def test_checkpoints_record_the_generator_and_another_is_refused(halfway, capsys, args):
    meta = checkpoint_meta.read_meta(halfway)
    assert meta["prng"] == "threefry2x32"
    prng.check_recorded({}, "an older checkpoint")
    with pytest.raises(UserError, match="DIR: .*'rbg'.*'threefry2x32'"):
        prng.check_recorded({"prng": "rbg"}, "DIR")


def test_another_precision_is_recorded_and_said(halfway, args, tmp_path, capsys):
    workdir = shutil.copytree(halfway, tmp_path / "run")
    with configured({"jax_default_matmul_precision": "highest"}):
        assert command("train", f"--workdir={workdir}", *args) == 0
        printed = capsys.readouterr()
        assert "note: trained until here with" in printed.out
        assert "from here with jax_default_matmul_precision=highest" in printed.out
        assert "note: jax_default_matmul_precision=highest" in printed.err
        recorded = jax_settings.recorded()
        assert command("evaluate", f"--workdir={workdir}") == 0
    assert recorded["jax_default_matmul_precision"] == "highest"
    assert checkpoint_meta.read_meta(workdir)["jax_settings"] == recorded
    assert json.loads((workdir / "evaluate.json").read_text())["jax_settings"] == recorded


def test_disable_jit_is_refused(capsys, tmp_path):
    with configured({"jax_disable_jit": True}):
        assert command("evaluate", f"--workdir={tmp_path}") == 2
    assert capsys.readouterr().err.startswith("error: JAX_DISABLE_JIT: must be off")


def test_flags_of_xla_that_compute_nothing_else_are_not_recorded(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=/d --xla_cpu_enable_fast_math=true")
    assert jax_settings.recorded()["XLA_FLAGS"] == "--xla_cpu_enable_fast_math=true"
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to='/d' 'unbalanced")  # XLA itself complains
    assert "XLA_FLAGS" in jax_settings.recorded()
