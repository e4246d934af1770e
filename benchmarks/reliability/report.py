"""Writes docs/reliability.md from the rows of all sections."""

import json
import os
import pathlib
import platform
import subprocess

from benchmarks import report_writer
from benchmarks.reliability import cost
from benchmarks.reliability.verbs import OUTCOMES

FAULTS = ("silent", "traceback", "hang")
HEAD = """# Reliability

Outcomes of kills, damage and hostile input, counted by `python -m benchmarks.reliability`.

- *identical*: the result is bit for bit that of an undisturbed run.
- *clean error*: one line with the reason, and a non-zero exit code.
- *fell back*: another intact checkpoint was used, with a line on stderr.
- *accepted*, *exact*: valid input, read correctly.
- *differs, noted*: a setting that users change on purpose changes numbers, with a line on stderr.
- *silent*, *traceback*, *hang*: faults; all must be 0.

"""
TITLES = {
    "kills": "SIGKILL, then the same command again",
    "kills_of_two": "SIGKILL of one of two processes",
    "corruption": "Damaged files in a workdir",
    "starts": "Several runs in one workdir",
    "readers": "Readers during a writer",
    "foreign": "Foreign files given to convert",
    "configs": "Values of config fields, and data files",
    "prompts": "Prompts and prompt files",
    "infilling": "Known text in infilling",
    "settings": "Environment variables of JAX's users",
    "cost": "Cost of the checks",
}
# Columns that have another name in some tables.
_ACCEPTED = {"identical": "accepted"}
RENAMED = {
    "foreign": _ACCEPTED,
    "configs": _ACCEPTED,
    "prompts": _ACCEPTED,
    "infilling": {"identical": "exact", "clean error": "refused", "silent": "changed"},
    "settings": {"fell back": "differs, noted"},
}


def write(out: pathlib.Path, sections: dict[str, dict]) -> int:
    """Writes `out`.json and .md; returns the number of faults.

    Sections that an earlier run left in `out`.json are kept, unless they were run again.
    """
    machine = _machine()
    for section in sections.values():
        section |= {"commit": machine["commit"], "cpu": machine["cpu"]}
    path = out.with_suffix(".json")
    before = json.loads(path.read_text())["sections"] if path.exists() else {}
    sections = {name: (before | sections)[name] for name in TITLES if name in before | sections}
    text, faults = HEAD, 0
    for name, section in sections.items():
        rows = section["rows"]
        measured = f"{section['seconds']:.0f} s, {section['cpu']}, commit {section['commit']}.\n\n"
        text += f"## {TITLES[name]}\n\n"
        if name == "cost":
            text += report_writer.table(
                cost.COLUMNS, [[row[c] for c in cost.COLUMNS] for row in rows]
            )
            text += f"\nMedians; runs with and without are interleaved. {measured}"
            continue
        faults += sum(row[fault] for row in rows for fault in FAULTS)
        columns = ["what", "attempts", *OUTCOMES]
        names = [RENAMED.get(name, {}).get(column, column) for column in columns]
        text += report_writer.table(names, [[row[c] for c in columns] for row in _with_sum(rows)])
        text += f"\n{measured}"
    text += f"{machine['cores']} cores, several sections at a time.\n"
    report_writer.write(out, {"machine": machine, "sections": sections}, text)
    return faults


def _with_sum(rows: list[dict]) -> list[dict]:
    if len(rows) < 2:
        return rows
    columns = ["attempts", *OUTCOMES]
    return [*rows, {"what": "all"} | {c: sum(row[c] for row in rows) for c in columns}]


def _machine() -> dict:
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True
    ).stdout.strip()
    return {
        "cpu": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "commit": commit or "unknown",
        "python": platform.python_version(),
    }
