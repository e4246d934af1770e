"""The short form of `python -m benchmarks.reliability`, and that its counts see a fault."""

import json
import os
import subprocess
import sys

import pytest
from compilation import FAST_ENVIRONMENT
from thorough import ALL

from benchmarks.reliability import report
from benchmarks.reliability.verbs import Child, Row

pytestmark = pytest.mark.fast_compile

# Other tests damage each part of a checkpoint, start several runs, and read during one.
SECTIONS = "kills,corruption,prompts" if ALL else "kills,prompts"


def test_nothing_is_silent_crashes_or_hangs(tmp_path):
    command = [sys.executable, "-m", "benchmarks.reliability", "--quick", f"--only={SECTIONS}"]
    environment = os.environ | FAST_ENVIRONMENT
    done = subprocess.run(
        [*command, "--jobs=1", f"--out={tmp_path / 'table'}"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    sections = json.loads((tmp_path / "table.json").read_text())["sections"]
    rows = [row for section in sections.values() for row in section["rows"]]
    assert sections.keys() == set(SECTIONS.split(","))
    assert all(row["attempts"] for row in rows)
    assert not any(row[fault] for row in rows for fault in report.FAULTS)


def test_a_process_that_fails_counts_as_what_it_is(capsys):
    def crash():
        raise ValueError("unforeseen")

    def refuse():
        print("error: DIR: must be a folder", file=sys.stderr)
        sys.exit(2)

    def wait():
        while True:
            pass

    with capsys.disabled():  # the children's sys.stderr is the descriptor, not pytest's file
        crashed, hanging = Child(crash).wait(30), Child(wait).wait(0.5)
        refused = Child(refuse).wait(30)
    assert crashed.fault == "traceback" and hanging.fault == "hang"
    assert refused.is_clean_error and refused.fault is None
    assert Child(lambda: {"a": 1}).wait(30).value == {"a": 1}


def test_faults_are_counted(tmp_path):
    row = Row("attempts")
    row.add("identical", times=3)
    row.add("silent", "other numbers")
    sections = {"kills": {"rows": [row.to_json()], "seconds": 1.0}}
    assert report.write(tmp_path / "table", sections) == 1
    assert "| attempts | 4 | 3 | 0 | 0 | 1 | 0 | 0 |" in (tmp_path / "table.md").read_text()
