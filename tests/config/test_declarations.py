"""A field is declared once: the command line, the checks and docs/config.md follow from it."""

import subprocess
import sys

import pytest
import tiny_run
from config_files import ROOT

from esolm_jax import config as config_lib
from esolm_jax import prepare
from esolm_jax.attention import attend
from esolm_jax.config import checks, page, schema
from esolm_jax.config.field import Field
from esolm_jax.errors import UserError
from esolm_jax.model import build
from esolm_jax.model.model_config import REMAT, ModelConfig
from esolm_jax.training import restore

pytestmark = pytest.mark.fast_compile


def test_the_page_is_current():
    """If it is not: python -m esolm_jax.config.page docs/config.md"""
    assert (ROOT / "docs" / "config.md").read_text(encoding="utf-8") == page.page()


def test_the_command_of_the_page_writes_it(tmp_path):
    path = tmp_path / "config.md"
    subprocess.run(
        [sys.executable, "-m", "esolm_jax.config.page", path], cwd=ROOT, check=True, timeout=60
    )
    assert path.read_text(encoding="utf-8") == page.page()


def test_the_config_is_read_without_jax():
    """Config files are read before JAX is configured, and by scripts that do not need it."""
    code = "import sys, esolm_jax.config; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


@pytest.fixture
def colour(monkeypatch):
    """A field of config.sample that this file alone declares."""
    field = Field("red", "Colour of the texts.", checks.OneOf(("red", "green")), before="red")
    monkeypatch.setitem(schema.SECTIONS["sample"], "colour", field)


def test_a_new_field_is_on_the_command_line_and_checked(colour, tmp_path, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(prepare, "main", lambda config, workdir: seen.append(config))
    common = [f"--workdir={tmp_path}", f"--config={tiny_run.FILE}"]
    assert tiny_run.command("prepare", *common) == 0
    assert tiny_run.command("prepare", *common, "--config.sample.colour=green") == 0
    assert [config.sample.colour for config in seen] == ["red", "green"]
    capsys.readouterr()
    assert tiny_run.command("prepare", *common, "--config.sample.colour=gren") == 2
    assert capsys.readouterr().err == (
        "error: config.sample.colour='gren': must be one of red, green (did you mean 'green'?)\n"
    )


def test_a_new_field_is_on_the_page(colour):
    row = '| `colour` | str | `"red"` | one of red, green | Colour of the texts. |  |\n'
    assert row in page.page()


def test_a_new_field_is_in_configs_saved_without_it(colour):
    saved = config_lib.to_saved(config_lib.default_config())
    del saved["sample"]["colour"]
    assert config_lib.from_saved(saved).sample.colour == "red"


def test_names_that_are_registered_later_are_allowed():
    names = {"red": 1}
    check = checks.OneOf(names)
    assert checks.problem(check, "green").startswith("one of red")
    names["green"] = 2
    assert checks.problem(check, "green") == "" and check.text == "one of red, green"


def test_every_field_is_documented_in_one_line():
    for name, field in config_lib.fields().items():
        assert field.doc.endswith(".") and "\n" not in field.doc, name


def test_former_values_stand_for_allowed_values_of_the_section():
    fields = config_lib.fields()
    for name, field in fields.items():
        for value, now in field.former_values.items():
            assert not config_lib.is_allowed(name, value), f"{name}={value}: is still allowed"
            assert name in now, f"{name}={value}: has no value of its own"
            for other, new in now.items():
                assert other.rpartition(".")[0] == name.rpartition(".")[0]
                assert type(new) is type(fields[other].default)
                assert config_lib.is_allowed(other, new), f"{other}={new}"


def test_allowed_values_are_those_of_their_owners():
    fields = config_lib.fields()
    assert tuple(fields["model.remat"].check.names) == tuple(REMAT)
    assert set(fields["model.attention"].check.names) - {"auto"} <= set(attend.KINDS)


def test_sizes_of_the_model():
    sizes = ModelConfig.__dataclass_fields__.keys()
    policies = {"vocab_size", "dropout", "dropout_bits", "dtype", "unroll", "attention", "remat"}
    assert set(build.SIZES) == sizes - policies
    assert set(restore.MODEL_FIELDS) == {"objective", "start_token"} | {
        f"model.{name}" for name in build.SIZES
    }


MAY_CHANGE = """data.files data.train data.validation data.test data.dir data.workers
    model.attention model.remat model.loss_chunk model.unroll model.dropout_bits
    train.steps train.log_every train.eval_every train.eval_windows train.metrics
    train.checkpoint_every
    train.keep_last train.keep_best train.on_non_finite
    train.profile_steps train.time_limit""".split()


def test_what_may_change_on_resumption():
    sections = ("mesh", "distributed", "eval", "sample")
    rest = [name for name in config_lib.fields() if name.split(".")[0] in sections]
    assert set(config_lib.names_with("may_change_on_resume")) == {*MAY_CHANGE, *rest}


def test_is_allowed():
    assert config_lib.is_allowed("init_from", "anything")
    assert not config_lib.is_allowed("train.steps", 0)
    with pytest.raises(UserError, match="config.train.stepz: unknown field"):
        config_lib.default_config().train.stepz = 1
