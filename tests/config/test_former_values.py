"""Values of fields that have another name today: in saved configs, config files and overrides.

sample.order="zigzag" was one of the orders; today it is sample.path="zigzag" with any order, and
sample.order="down" is called "descending".
"""

import copy
import pathlib
import pickle

import pytest
import tiny_run

from esolm_jax import config as config_lib
from esolm_jax import prepare
from esolm_jax.config import page, schema
from esolm_jax.config.checks import OneOf
from esolm_jax.config.field import Field
from esolm_jax.errors import UserError

pytestmark = pytest.mark.fast_compile

DOWN = "config.sample.order=down: is config.sample.order=descending now; use the new value\n"
ZIGZAG = (
    "config.sample.order=zigzag: is config.sample.path=zigzag, config.sample.order=ascending now; "
    "use the new value\n"
)
CONTRADICTION = (
    "config.sample.order=zigzag: is config.sample.path=zigzag, config.sample.order=ascending now, "
    "but config.sample.path=spiral is also set; remove one of them"
)


def path_before(values) -> str:
    return "spiral" if values["sample.top_k"] > 5 else "straight"


@pytest.fixture(autouse=True)
def history(monkeypatch):
    order = Field(
        "ascending",
        "Order.",
        OneOf(("ascending", "descending")),
        formerly=("direction",),
        former_values={
            "down": {"sample.order": "descending"},
            "zigzag": {"sample.path": "zigzag", "sample.order": "ascending"},
        },
    )
    path = Field("straight", "Path.", OneOf(("straight", "spiral", "zigzag")), before=path_before)
    monkeypatch.setitem(schema.SECTIONS["sample"], "order", order)
    monkeypatch.setitem(schema.SECTIONS["sample"], "path", path)
    config_lib.begin_command()


def chosen(config) -> tuple[str, str]:
    config_lib.validate(config)
    return config.sample.order, config.sample.path


def saved_with(**fields) -> dict:
    """A config saved before sample.path existed."""
    saved = config_lib.default_config().to_dict()
    del saved["sample"]["path"]
    saved["sample"].update(fields)
    return saved


@pytest.mark.parametrize(
    ("fields", "values", "note"),
    [
        ({}, ("ascending", "straight"), ""),
        ({"order": "descending"}, ("descending", "straight"), ""),
        (
            {"order": "down"},
            ("descending", "straight"),
            "config.sample.order=down is config.sample.order=descending now",
        ),
        (
            {"order": "zigzag"},
            ("ascending", "zigzag"),
            "config.sample.order=zigzag is config.sample.path=zigzag, "
            "config.sample.order=ascending now",
        ),
        ({"top_k": 6}, ("ascending", "spiral"), ""),
        (
            {"order": "down", "top_k": 6},
            ("descending", "spiral"),
            "config.sample.order=down is config.sample.order=descending now",
        ),
    ],
)
def test_saved_config(fields, values, note, capsys):
    for _ in range(2):  # one notice
        assert chosen(config_lib.from_saved(saved_with(**fields), "runs/a")) == values
    assert capsys.readouterr().err == (f"runs/a: saved with earlier names: {note}\n" * bool(note))


def test_saved_config_with_an_earlier_name_and_value():
    saved = saved_with(direction="down")
    del saved["sample"]["order"]
    assert chosen(config_lib.from_saved(saved)) == ("descending", "straight")


def test_saved_config_that_contradicts_itself():
    config_lib.from_saved(saved_with(order="zigzag", path="zigzag"))
    with pytest.raises(UserError) as error:
        config_lib.from_saved(saved_with(order="zigzag", path="spiral"), "runs/a")
    assert str(error.value) == f"runs/a: {CONTRADICTION}"


@pytest.mark.parametrize("top_k", ["six", None, []])
def test_saved_config_from_which_a_new_field_does_not_follow(top_k):
    with pytest.raises(UserError, match="^runs/a: config.sample.path: missing, and it cannot"):
        config_lib.from_saved(saved_with(top_k=top_k), "runs/a")


@pytest.mark.parametrize("value", [["down"], None, 3, True])
def test_saved_value_of_another_type(value):
    config = config_lib.from_saved(saved_with(order=value))
    with pytest.raises(UserError, match="config.sample.order="):
        config_lib.validate(config)


def test_config_file(capsys):
    config = config_lib.default_config()
    config.sample.order = "down"
    assert chosen(config) == ("descending", "straight")
    config.sample.order = "zigzag"
    assert chosen(config) == ("ascending", "zigzag")
    assert capsys.readouterr().err == DOWN + ZIGZAG


def test_the_last_value_of_a_field_counts():
    config = config_lib.default_config()
    config.sample.order = "zigzag"
    config.sample.order = "descending"
    assert chosen(config) == ("descending", "straight")
    config.sample.order = "zigzag"
    config.sample.path = "spiral"
    config.sample.order = "descending"
    assert chosen(config) == ("descending", "spiral")


@pytest.mark.parametrize("path", ["straight", "spiral"])
def test_config_file_that_contradicts_itself(path):
    """A value that is set counts as such, even if it is the default."""
    config = config_lib.default_config()
    config.sample.path = path
    with pytest.raises(UserError) as error:
        config.sample.order = "zigzag"
    assert str(error.value) == CONTRADICTION.replace("spiral", path)
    assert chosen(config) == ("ascending", path)


@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        lambda config: pickle.loads(pickle.dumps(config)),
        lambda config: config.copy_and_resolve_references(),
    ],
)
def test_copies_know_what_was_set(copied):
    config = config_lib.default_config()
    config.sample.order = "zigzag"
    twin = copied(config)
    twin.sample.order = "descending"
    assert chosen(twin) == ("descending", "straight") and chosen(config) == ("ascending", "zigzag")
    twin.sample.path = "spiral"
    with pytest.raises(UserError, match="is also set"):
        copied(twin).sample.order = "zigzag"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run(*overrides, line=...): what `prepare` was told with a config file with this line."""

    def call(*args, line="pass"):
        configs = []
        monkeypatch.setattr(prepare, "main", lambda config, workdir: configs.append(config))
        file = tmp_path / "mine.py"
        text = pathlib.Path(tiny_run.FILE).read_text()
        file.write_text(text.replace("    config.sample.num_texts = 2\n", f"    {line}\n"))
        capsys.readouterr()
        code = tiny_run.command("prepare", f"--workdir={tmp_path}", f"--config={file}", *args)
        return code, configs and chosen(configs[0]), capsys.readouterr().err

    return call


@pytest.mark.parametrize(
    ("args", "values", "told"),
    [
        (["--config.sample.order=down"], ("descending", "straight"), DOWN),
        (["--config.sample.order", "down"], ("descending", "straight"), DOWN),
        (["--config.sample.order=zigzag"], ("ascending", "zigzag"), ZIGZAG),
        (["--config.sample.order", "zigzag", "--config.seed=1"], ("ascending", "zigzag"), ZIGZAG),
        (
            ["--config.sample.order=zigzag", "--config.sample.path=zigzag"],
            ("ascending", "zigzag"),
            ZIGZAG,
        ),
    ],
)
def test_override(run, args, values, told):
    assert run(*args) == (0, values, told)


def test_override_with_an_earlier_name_and_value(run):
    code, values, told = run("--config.sample.direction=zigzag")
    assert (code, values) == (0, ("ascending", "zigzag"))
    assert told == (
        "config.sample.direction: is called config.sample.order now; use the new name\n" + ZIGZAG
    )


@pytest.mark.parametrize("last", [False, True])
def test_overrides_that_contradict_each_other(run, last):
    args = ["--config.sample.order=zigzag", "--config.sample.path=spiral"]
    assert run(*(args[::-1] if last else args)) == (2, [], f"error: {CONTRADICTION}\n")


def test_the_last_override_counts(run):
    code, values, _ = run("--config.sample.order=zigzag", "--config.sample.order=descending")
    assert (code, values) == (0, ("descending", "straight"))


@pytest.mark.parametrize(
    ("line", "arg", "values"),
    [
        ("config.sample.order = 'zigzag'", "order=descending", ("descending", "straight")),
        ("config.sample.order = 'zigzag'", "path=spiral", ("ascending", "spiral")),
        ("config.sample.path = 'spiral'", "order=zigzag", ("ascending", "zigzag")),
        ("config.sample.path = 'spiral'", "order=down", ("descending", "spiral")),
    ],
)
def test_overrides_win_over_the_config_file(run, line, arg, values):
    assert run(f"--config.sample.{arg}", line=line)[:2] == (0, values)


def test_the_page_names_former_values():
    assert (
        "Order. Formerly `direction`. `down` is read as `config.sample.order=descending`. `zigzag` "
        "is read as `config.sample.path=zigzag, config.sample.order=ascending`."
    ) in page.page()


def test_attention_lean_is_chunked(run, capsys):
    note = "config.model.attention=lean: is config.model.attention=chunked now; use the new value\n"
    assert run("--config.model.attention=lean")[::2] == (0, note)
    saved = config_lib.default_config().to_dict()
    saved["model"]["attention"] = "lean"
    assert config_lib.from_saved(saved).model.attention == "chunked"


def test_confidence_was_a_schedule(monkeypatch):
    saved = saved_with(schedule="confidence", tokens_per_pass=3)
    del saved["sample"]["loop"]
    config = config_lib.from_saved(saved)
    assert (config.sample.schedule, config.sample.loop) == ("ancestral", "confidence")
    args = ["sample", "--config.sample.schedule=confidence"]
    assert config_lib.with_current_overrides(args)[1:] == [
        "--config.sample.schedule=ancestral",
        "--config.sample.loop=confidence",
    ]
