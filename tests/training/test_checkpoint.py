"""Checkpoints: which are kept, what they hold, and what is told of those that do not fit."""

import pathlib

import pytest
import tiny_run
from orbax.checkpoint.path import atomicity_types
from saved_steps import META, WRITERS, assert_same, make_state, shapes, steps_in, write

import esolm_jax
from esolm_jax import config as config_lib
from esolm_jax import saved_config
from esolm_jax.errors import UserError
from esolm_jax.training import checkpoint, checkpoint_meta, checkpoint_reader, checkpoint_steps


def test_the_last_and_the_best_are_kept(tmp_path):
    write(tmp_path, {1: 5.0, 2: 3.0, 3: 4.0, 4: 4.5, 5: 3.5, 6: 3.9})
    assert steps_in(tmp_path) == {2, 5, 6}


def test_the_best_is_kept_over_a_resumption_and_among_saves_without_nelbo(tmp_path):
    write(tmp_path, {1: None, 2: 3.0, 3: None})
    write(tmp_path, {4: 4.0, 5: None, 6: None})
    assert steps_in(tmp_path) == {2, 5, 6}


def test_keep_best_of_0_keeps_the_last_alone(tmp_path):
    write(tmp_path, {1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0}, keep_last=1, keep_best=0)
    assert steps_in(tmp_path) == {4}


def test_state_and_meta_come_back_as_they_were(tmp_path):
    write(tmp_path, {1: None, 2: None, 12: 0.5})
    checkpoints = checkpoint.Checkpoints(tmp_path, **WRITERS)
    assert checkpoints.latest_step == 12
    state, meta = checkpoints.restore(shapes(make_state(0)))
    checkpoints.close()
    assert_same(state, make_state(12))
    assert meta == META | {"cursor": 120}
    assert checkpoint_meta.read_meta(tmp_path) == meta


def test_saving_the_same_step_again_is_harmless(tmp_path):
    write(tmp_path, {3: 1.0})
    write(tmp_path, {3: 1.0})
    assert steps_in(tmp_path) == {3}


def test_weights_are_restored_alone(tmp_path):
    write(tmp_path, {4: None})
    params = make_state(4).params
    raw, step = checkpoint_reader.restore_weights(tmp_path, "raw", shapes(params))
    ema, _ = checkpoint_reader.restore_weights(tmp_path, "ema", shapes(params))
    assert step == 4
    assert_same(raw, params)
    assert_same(ema, make_state(4).ema)


def half_written(workdir, step: int) -> pathlib.Path:
    """What a save that was killed midway leaves."""
    name = f"{step}{atomicity_types.TMP_DIR_SUFFIX}-1700000000000000"
    folder = workdir / checkpoint_steps.FOLDER / name
    (folder / "params").mkdir(parents=True)
    (folder / "params" / "part").write_text("half")
    return folder


def test_half_written_checkpoint_is_ignored_and_then_cleaned(tmp_path):
    write(tmp_path, {2: None})
    left = half_written(tmp_path, 3)
    assert checkpoint_meta.read_meta(tmp_path)["cursor"] == 20
    assert checkpoint_reader.restore_weights(tmp_path, "ema", shapes(make_state(0).params))[1] == 2
    assert left.exists()  # whoever only reads leaves it: its writer may be alive
    checkpoints = checkpoint.Checkpoints(tmp_path, **WRITERS)
    assert checkpoints.latest_step == 2
    checkpoints.save(make_state(3), META)
    checkpoints.close()
    assert not left.exists()
    assert steps_in(tmp_path) == {2, 3}


def test_half_written_checkpoint_alone_is_none(tmp_path):
    half_written(tmp_path, 3)
    with pytest.raises(UserError, match="no finished checkpoint"):
        checkpoint_meta.read_meta(tmp_path)
    checkpoints = checkpoint.Checkpoints(tmp_path, **WRITERS)
    assert checkpoints.latest_step is None
    checkpoints.close()


def test_checkpoint_of_another_size_names_parameter_and_shapes(tmp_path):
    write(tmp_path, {2: None})
    other = shapes(make_state(0, width=5).params)
    with pytest.raises(UserError) as error:
        checkpoint_reader.restore_weights(tmp_path, "raw", other)
    for part in (str(tmp_path), "['block']['kernel']", "(3,)", "(5,)"):
        assert part in str(error.value)


def test_checkpoint_with_other_parameters_names_one(tmp_path):
    write(tmp_path, {2: None})
    fewer = shapes({"block": {"kernel": make_state(0).params["block"]["kernel"]}})
    with pytest.raises(UserError, match=r"\['block'\]\['bias'\] has shape \(\) there, None"):
        checkpoint_reader.restore_weights(tmp_path, "ema", fewer)


def test_workdir_without_checkpoints_is_told(tmp_path):
    for read in (checkpoint_meta.read_meta, checkpoint_meta.saved_config, saved_config.get_config):
        with pytest.raises(UserError, match="no checkpoints here"):
            read(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_saved_config_is_the_config_of_the_run(tmp_path):
    changes = {"alpha_0": 0.125, "data.train": "a b, ü*.txt", "optimizer.eps": 1e-12, "seed": 7}
    config = tiny_run.make_config(changes)
    checkpoints = checkpoint.Checkpoints(tmp_path, **WRITERS)
    checkpoints.save(make_state(1), META | {"config": config.to_dict()})
    checkpoints.close()
    saved = saved_config.get_config(str(tmp_path))
    assert config_lib.flat(saved) == config_lib.flat(config)
    types = {name: type(value) for name, value in config_lib.flat(saved).items()}
    assert types == {name: type(value) for name, value in config_lib.flat(config).items()}
    assert saved.is_locked and saved.model.is_locked
    config_lib.validate(saved)


def test_meta_of_a_training_run(tmp_path):  # noqa: F811
    fields = tiny_run.write_data(tmp_path / "data")
    config = tiny_run.make_config(fields | {"objective": "ar", "train.steps": 3})
    tiny_run.train(config, tmp_path / "run")
    meta = checkpoint_meta.read_meta(tmp_path / "run")
    assert meta["config"] == config_lib.to_saved(config)
    assert meta["cursor"] == 3 * config.train.batch_size
    assert meta["version"] == esolm_jax.__version__
    assert meta["tokenizer"] == {
        "kind": "bytes", "fingerprint": "utf-8-bytes-v1", "vocab_size": 259, "mask_id": 259,
        "bos_id": 256, "eos_id": 257, "pad_id": 258,
    }  # fmt: skip
    state, _ = tiny_run.last_checkpoint(config, tmp_path / "run")
    assert state.step == 3
