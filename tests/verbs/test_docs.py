"""The commands in README, docs and configs exist and are in a working order."""

import importlib
import pathlib
import re
import shlex

import pytest
from absl import flags

from benchmarks import published_ratios, report_writer
from esolm_jax import config as config_lib

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.py"))
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
VERBS = (
    "prepare",
    "train",
    "evaluate",
    "sample",
    "convert",
    "export",
    "verify",
    "compile",
    "judge",
)
COMMON = {"workdir", "config"}


def commands(text: str) -> list[list[str]]:
    """Arguments of the indented `python -m esolm_jax.VERB …` lines, continued lines joined."""
    text = re.sub(r"\\+\n\s*", " ", text)
    lines = [line for line in text.splitlines() if re.match(r" {4}python -m esolm_jax\.\w+ ", line)]
    return [shlex.split(line, comments=True)[2:] for line in lines]


def flags_of(verb: str) -> set[str]:
    """Those that the verb alone defines, and those that all share."""
    module = importlib.import_module(f"esolm_jax.{verb}")
    cli_flags = {"step"} if verb in ("evaluate", "sample", "convert", "export") else set()
    before = set(flags.FLAGS)
    module.CLI.define_flags()
    defined = set(flags.FLAGS) - before
    for name in defined:
        delattr(flags.FLAGS, name)
    return COMMON | cli_flags | defined


def check(argv: list[str]) -> None:
    verb = argv[0].removeprefix("esolm_jax.")
    assert verb in VERBS
    allowed, fields = flags_of(verb), config_lib.flat(config_lib.default_config())
    for arg in argv[1:]:
        name, _, value = arg.removeprefix("--").partition("=")
        assert arg.startswith("--"), arg
        if name.startswith("config."):
            assert name.removeprefix("config.") in fields, arg
        else:
            assert name in allowed, arg
        if name == "config":
            assert (ROOT / value.partition(":")[0]).is_file(), arg


@pytest.mark.parametrize("path", [*CONFIGS, *PAGES], ids=lambda path: path.name)
def test_commands_exist(path):
    text = path.read_text(encoding="utf-8")
    found = commands(text)
    assert found or "launch/quickstart.sh" in text or path not in CONFIGS
    for argv in found:
        check(argv)


def test_pages_with_commands_are_checked():
    checked = {path.name for path in PAGES if commands(path.read_text(encoding="utf-8"))}
    guides = "data distributed export interop runs sampling_guide".split()
    assert checked >= {"README.md", *(f"{name}.md" for name in guides)}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_pages_have_a_title_and_links_that_lead_somewhere(path):
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# ")
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert target.startswith("https://") or (path.parent / target).is_file(), target


def test_pages_with_figures_say_what_made_them_and_at_which_commit():
    pages = [path for path in PAGES if path.with_suffix(".json").is_file()]
    assert len(pages) > 8
    for path in pages:
        text = path.read_text(encoding="utf-8")
        assert re.search(r"`python -m benchmarks\.\w+", text), path.name
        assert re.search(r"commit [0-9a-f]{7}", text), path.name


def test_a_page_that_is_written_now_ends_with_commit_and_machine(tmp_path, capsys):
    report_writer.write(tmp_path / "page", {}, "# Title\n")
    assert re.search(r"\nRecorded at commit \w+ on .+, \d+ CPU threads\.\n$", page_of(tmp_path))
    report_writer.write(tmp_path / "page", {}, "# Title, of commit 123\n")
    assert page_of(tmp_path) == "# Title, of commit 123\n"


def page_of(folder) -> str:
    return (folder / "page.md").read_text(encoding="utf-8")


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


def test_scripts_that_pages_name_exist():
    for path in PAGES:
        for name in re.findall(r"launch/\w+\.sh", path.read_text(encoding="utf-8")):
            assert (ROOT / name).is_file(), name


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_prepare_comes_before_train(path):
    """With the same config, workdir and data."""
    prepared = []
    for verb, *rest in commands(path.read_text(encoding="utf-8")):
        if verb == "esolm_jax.prepare":
            prepared.append(rest)
        if verb == "esolm_jax.train":
            assert any(set(rest) <= set(before) for before in prepared)
        named = [arg for arg in rest if arg.startswith("--config=configs/")]
        assert all(f"configs/{path.name}" in arg for arg in named)


def test_a_range_begins_with_the_least():
    assert published_ratios.text(9.24, [3.3]) == "3.30–9.24"
    assert published_ratios.text(0.8, [1.0, 1.5]) == "0.80–1.50"
    assert published_ratios.text(1.234, []) == "1.23"
    assert published_ratios.least(9.24, [3.3]) == 3.3


def test_ratios_are_quoted_with_the_least_first():
    sampling = (ROOT / "docs" / "sampling.md").read_text()
    assert "3.30–9.24" in sampling and "BD3-LM (L′ = 4) yields more" in sampling
    assert "targets are met; missed:" in sampling.split("| L |")[0]
    assert "0.84–1.05" in (ROOT / "docs" / "train_speed.md").read_text()
    results = (ROOT / "docs" / "results.md").read_text()
    assert "3.3 to 9.2 ×" in results and "9.2 ×" not in results.replace("to 9.2 ×", "")
