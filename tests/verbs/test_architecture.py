"""ARCHITECTURE.md says what the code is: its layers, letters, files and tests exist."""

import ast
import pathlib
import re
import tomllib

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGE = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
PAGES = PAGE + (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
SUFFIX = re.compile(r"[a-z][a-z0-9_]*_([A-Z]{1,6})")


def section(name: str) -> list[str]:
    """The lines after a `<!-- name -->` mark, up to the first blank line."""
    return PAGE.split(f"<!-- {name} -->\n")[1].split("\n\n")[0].splitlines()


def legend() -> list[str]:
    cells = (line.split("|")[1] for line in section("legend")[2:])
    return [letter for cell in cells for letter in re.findall(r"[A-Z]", cell)]


def names(tree: ast.AST) -> set[str]:
    """Every name of a variable, an argument or an attribute."""
    nodes = list(ast.walk(tree))
    found = {node.id for node in nodes if isinstance(node, ast.Name)}
    found |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    return found | {node.attr for node in nodes if isinstance(node, ast.Attribute)}


def test_layers_are_the_contract():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (layers,) = (
        contract["layers"]
        for contract in settings["tool"]["importlinter"]["contracts"]
        if contract["type"] == "layers"
    )
    assert [line.strip() for line in section("layers")] == layers


def test_letters_of_shapes_are_in_the_legend():
    letters = legend()
    assert len(letters) == len(set(letters)) > 10
    used = set()
    for path in (ROOT / "esolm_jax").rglob("*.py"):
        for name in names(ast.parse(path.read_text(encoding="utf-8"))):
            if match := SUFFIX.fullmatch(name):
                unknown = set(match[1]) - set(letters)
                assert not unknown, f"{path.relative_to(ROOT)}: {name}: {unknown}"
                used |= set(match[1])
    assert used > set("BLTSPWGRKDFV")


def test_named_tests_exist():
    found = re.findall(r"`([\w/]+\.py)::(test_\w+)`", PAGE)
    assert len(found) > 25
    for file, test in found:
        text = (ROOT / "tests" / file).read_text(encoding="utf-8")
        assert re.search(rf"^def {test}\(", text, re.MULTILINE), f"{file}::{test}"


def test_named_files_exist():
    found = re.findall(r"`((?:[\w.-]+/)*[\w.-]+\.(?:py|md|sh|toml|json))`", PAGES)
    written = {
        "manifest.json",
        "evaluate.json",
        "NAME.py",
        "NAME_source.py",
    }  # by verbs; by the reader
    folders = [
        ROOT,
        ROOT / "tests",
        ROOT / "esolm_jax",
        *(ROOT / "esolm_jax" / "sampling").iterdir(),
    ]
    for name in {name for name in found if pathlib.Path(name).name not in written}:
        assert any((folder / name).is_file() for folder in folders), name
