"""Every name that a benchmark or a config imports from this repository exists.

Nothing runs the benchmarks in CI, so a renamed function would be noticed by their next user.
"""

import ast
import functools
import json
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[2]
FILES = sorted([*ROOT.glob("benchmarks/**/*.py"), *ROOT.glob("configs/*.py")])
OURS = ("benchmarks", "configs", "esolm_jax")


def file_of(module: str) -> pathlib.Path | None:
    path = ROOT / pathlib.Path(*module.split("."))
    found = [path.with_suffix(".py"), path / "__init__.py"]
    return next((f for f in found if f.exists()), path if path.is_dir() else None)


@functools.cache
def names_in(path: pathlib.Path) -> frozenset[str]:
    """What a module defines or imports, at any depth outside of functions and classes."""
    names = set()

    def add(body):
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Import | ast.ImportFrom):
                names.update((a.asname or a.name).split(".")[0] for a in node.names)
            else:
                stored = (n for n in ast.walk(node) if isinstance(n, ast.Name))
                names.update(n.id for n in stored if isinstance(n.ctx, ast.Store))
                for part in ("body", "orelse", "handlers", "finalbody"):
                    add(getattr(node, part, []))

    if path.is_file():
        add(ast.parse(path.read_text()).body)
    return frozenset(names)


def imports(path: pathlib.Path):
    """(module, name or None) of each import of ours in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from ((node.module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)


def missing(path: pathlib.Path) -> list[str]:
    found = []
    for module, name in imports(path):
        if module.split(".")[0] not in OURS:
            continue
        file = file_of(module)
        if file is None:
            found.append(module)
        elif name and name not in names_in(file) and file_of(f"{module}.{name}") is None:
            lazy = file.name == "__init__.py" and "__getattr__" in names_in(file)
            found += [] if lazy else [f"{module}.{name}"]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imported_names_exist(path):
    assert missing(path) == []


def test_a_renamed_function_is_noticed(tmp_path):
    path = tmp_path / "benchmark.py"
    path.write_text("from esolm_jax.results import write_json, write_jsom\nimport esolm_jax.gone\n")
    assert missing(path) == ["esolm_jax.results.write_jsom", "esolm_jax.gone"]


def test_the_page_of_pod_cost_can_be_written_from_what_was_recorded():
    """With rows of earlier commits, which lack newer figures."""
    from benchmarks import pod_cost

    found = json.loads((ROOT / "docs" / "pod_cost.json").read_text())
    for row in next(iter(found["configs"].values())), next(iter(found["gpus"].values())):
        row.pop("traffic", None)
        row.pop("commit", None)
    text = pod_cost.table(found)
    assert "b79972c or before" in text and "with memory" in text
