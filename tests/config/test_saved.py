"""Saved configs, config files and command lines with the names of an earlier version."""

import copy
import json
import pathlib
import pickle

import pytest
import tiny_run

from esolm_jax import config as config_lib
from esolm_jax import prepare
from esolm_jax.config import removed, schema
from esolm_jax.config.field import Field
from esolm_jax.config.removed import Removed
from esolm_jax.errors import UserError

pytestmark = pytest.mark.fast_compile

NOTICE = "config.sample.hue: is called config.sample.colour now; use the new name\n"


@pytest.fixture(autouse=True)
def history(monkeypatch):
    """sample.colour was called sample.hue, then sample.tint; train.magic was removed."""
    field = Field(3, "Colour.", formerly=("hue", "tint"))
    monkeypatch.setitem(schema.SECTIONS["sample"], "colour", field)
    entry = Removed(False, "train without it")
    monkeypatch.setitem(removed.REMOVED, "train.magic", entry)
    config_lib.begin_command()


def saved_as(old: str) -> dict:
    """A saved config of schema 1 in which sample.colour = 7 has another name."""
    saved = config_lib.default_config().to_dict()
    del saved["sample"]["colour"]
    saved["sample"][old] = 7
    return saved


@pytest.mark.parametrize("old", ["hue", "tint"])
def test_saved_config_with_an_earlier_name(old, capsys):
    for _ in range(2):  # one notice
        config = config_lib.from_saved(saved_as(old), "runs/a")
    assert config.sample.colour == 7 and config.is_locked
    config_lib.validate(config)
    assert capsys.readouterr().err == (
        f"runs/a: saved with earlier names: config.sample.{old} is config.sample.colour now\n"
    )


def test_a_config_of_today_is_read_without_a_word(capsys):
    config = config_lib.default_config()
    config.sample.colour = 5
    saved = json.loads(json.dumps(config_lib.to_saved(config)))
    assert saved["schema_version"] == schema.VERSION
    assert config_lib.from_saved(saved) == config
    assert capsys.readouterr().err == ""


def test_both_names_at_once():
    saved = saved_as("hue")
    saved["sample"]["colour"] = 1
    with pytest.raises(UserError, match="runs/a: config.sample.colour: must be given once"):
        config_lib.from_saved(saved, "runs/a")


@pytest.mark.parametrize("version", [schema.VERSION + 1, 10**9])
def test_a_later_version_is_refused(version):
    saved = config_lib.to_saved(config_lib.default_config()) | {"schema_version": version}
    with pytest.raises(UserError) as error:
        config_lib.from_saved(saved, "runs/a")
    told = str(error.value)
    assert told.startswith(f"runs/a: its config has schema_version {version}, but this esolm_jax")
    assert "install the esolm_jax that wrote it" in told and "\n" not in told


@pytest.mark.parametrize("version", [0, -1, "2", None, True, 1.5, {}])
def test_a_version_that_is_none(version):
    with pytest.raises(UserError, match="runs/a: schema_version="):
        config_lib.from_saved({"schema_version": version}, "runs/a")


def test_removed_field_of_a_saved_config():
    """A value that stands for what the code does today still loads."""
    saved = config_lib.default_config().to_dict()
    saved["train"]["magic"] = False
    assert config_lib.from_saved(saved) == config_lib.default_config()
    saved["train"]["magic"] = True
    with pytest.raises(UserError, match="^runs/a: config.train.magic: was removed; train without"):
        config_lib.from_saved(saved, "runs/a")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"zzz": 1}, "runs/a: config.zzz: unknown field; use the version"),
        ({"train": {}}, "runs/a: config.train.batch_size: missing, so it is not a config of"),
        ({"train": 3}, "runs/a: config.train: unknown field"),
        ({"seed": {"a": 1}}, "runs/a: config.seed.a: unknown field"),
        ({"sample": {"top_k": {"a": 1}}}, "runs/a: config.sample.top_k: unknown field"),
    ],
)
def test_foreign_config(change, told):
    with pytest.raises(UserError) as error:
        config_lib.from_saved(config_lib.default_config().to_dict() | change, "runs/a")
    assert str(error.value).startswith(told) and "\n" not in str(error.value)


def test_config_file_with_an_earlier_name(capsys):
    config = config_lib.default_config()
    config.sample.hue = 4
    config.sample.hue += 1
    assert config.sample.colour == 5 and config.sample["hue"] == 5
    assert config_lib.flat(config).keys() == config_lib.fields().keys()
    assert capsys.readouterr().err == NOTICE


@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        lambda config: pickle.loads(pickle.dumps(config)),
        lambda config: config.copy_and_resolve_references(),
        lambda config: config_lib.from_saved(config.to_dict()),
    ],
)
def test_copies_know_the_earlier_names(copied):
    config = config_lib.default_config()
    twin = copied(config)
    assert twin == config
    twin.sample.hue = 9
    assert twin.sample.colour == 9 and config.sample.colour == 3


def test_a_section_given_as_a_dict_is_a_section():
    config = config_lib.default_config()
    config.mesh = config.mesh.to_dict() | {"data": 2}
    config_lib.validate(config)
    assert config.mesh.data == 2


def test_config_file_with_a_removed_field():
    with pytest.raises(UserError, match="^config.train.magic: was removed; train without it"):
        config_lib.default_config().train.magic = True


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run(*args): exit code of `prepare` with a main that only keeps the config; the config;
    stderr."""

    def call(*args, file=tiny_run.FILE):
        configs = []
        monkeypatch.setattr(prepare, "main", lambda config, workdir: configs.append(config))
        capsys.readouterr()
        code = tiny_run.command("prepare", f"--workdir={tmp_path}", f"--config={file}", *args)
        return code, (configs or [None])[0], capsys.readouterr().err

    return call


@pytest.mark.parametrize("args", [["--config.sample.hue=8"], ["--config.sample.hue", "8"]])
def test_override_with_an_earlier_name(run, args):
    code, config, told = run(*args)
    assert (code, config.sample.colour, told) == (0, 8, NOTICE)


def test_the_last_override_counts(run):
    code, config, _ = run("--config.sample.colour=1", "--config.sample.hue=2")
    assert (code, config.sample.colour) == (0, 2)


def test_override_of_a_removed_field(run):
    code, _, told = run("--config.train.magic=1")
    assert (code, told) == (2, "error: config.train.magic: was removed; train without it\n")


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("config.sample.hue = 4", NOTICE),
        ("config.train.magic = 1", "error: config.train.magic: was removed; train without it\n"),
        (
            "config.sample.colur = 1",
            "error: config.sample.colur: unknown field (did you mean 'colour'?)\n",
        ),
    ],
)
def test_config_file_of_a_user(run, tmp_path, line, told):
    file = tmp_path / "mine.py"
    text = pathlib.Path(tiny_run.FILE).read_text()
    file.write_text(text.replace("    config.sample.num_texts = 2\n", f"    {line}\n"))
    code, config, stderr = run(file=file)
    assert stderr == told
    assert (code, config and config.sample.colour) == ((0, 4) if told == NOTICE else (2, None))
