"""benchmarks.zeroshot: its files are those of the suite, and it finds figures that differ."""

import copy
import sys

import pytest
from text_config import config
from thorough import thorough

from benchmarks import zeroshot, zeroshot_files, zeroshot_page
from esolm_jax.data import sources, wordpieces
from esolm_jax.evaluation.suite import suite_data, suite_file


def test_every_data_set_of_the_suite_has_files_and_text(tmp_path):
    zeroshot_files.write(tmp_path, 80)
    data_sets = suite_file.read("zeroshot").data_sets
    found = suite_data.find(data_sets, tmp_path)
    assert len({path.suffix for paths in found.values() for path in paths}) == 4
    for data_set in data_sets:
        fields = {k.removeprefix("data."): v for k, v in data_set.data_fields().items()}
        given = config("", test=",".join(map(str, found[data_set.name])))
        given.data.update(fields)
        texts = list(sources.documents(given, "test"))
        assert len(" ".join(texts).split()) > 300, data_set.name
        assert not any(zeroshot_files.NOT_READ in text for text in texts)


def test_tokenizer_is_of_the_kind_that_the_paper_configs_need(tmp_path):
    zeroshot_files.write_tokenizer(tmp_path / "gpt2", zeroshot_files.training_texts(200), 300)
    tokenizer = wordpieces.read(tmp_path / "gpt2")
    assert tokenizer.kind == "gpt2" and 257 < tokenizer.vocab_size <= 300
    text = "any text – with €\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def report(value=4.0):
    """The report of one data set, in the form of evaluation/suite."""
    result = {"bound": "nelbo", "nll_per_token": value, "perplexity": 50.0, "bits_per_token": 6.0}
    result |= {"bits_per_byte": 2.0, "standard_error": 0.1, "num_tokens": 640, "num_samples": 2}
    entries = [{"name": name, "title": name.upper(), "data": {}} for name in ("ptb", "lm1b")]
    return {"data_sets": [entry | {"results": [result]} for entry in entries]}


def row(found, wanted, **fields):
    differences = zeroshot_page.largest_differences(found, wanted)
    return {
        "killed": False,
        "done_before": [],
        "report": found,
        "differences": differences,
    } | fields


def test_figures_that_differ_are_found():
    wanted = report()
    assert zeroshot_page.agrees(row(report(4.0 * (1 + 9e-7)), wanted))
    assert not zeroshot_page.agrees(row(report(4.0 * (1 + 2e-6)), wanted))
    for field, value in (("standard_error", 0.1001), ("num_tokens", 639), ("bound", "exact")):
        other = copy.deepcopy(wanted)
        other["data_sets"][1]["results"][0][field] = value
        assert not zeroshot_page.agrees(row(other, wanted)), field
    missing = {"data_sets": wanted["data_sets"][:1]}
    assert not zeroshot_page.agrees(row(missing, wanted))


def test_a_run_that_does_something_twice_is_found():
    wanted = report()
    kills = [{"prepared": 1, "evaluated": []}, {"prepared": 2, "evaluated": ["PTB"]}]
    right = row(wanted, wanted, killed=True, kills=kills, done_before=["PTB"])
    assert zeroshot_page.agrees(right)
    assert not zeroshot_page.agrees(right | {"done_before": []})
    late = [kills[0], {"prepared": 2, "evaluated": ["LM1B", "PTB"]}]
    assert not zeroshot_page.agrees(right | {"kills": late, "done_before": ["PTB", "LM1B"]})
    assert not zeroshot_page.agrees(row(wanted, wanted, done_before=["PTB"]))


@thorough
def test_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["zeroshot", "--quick", f"--out={tmp_path}/check"])
    zeroshot.main()
    assert "SIGKILL" in (tmp_path / "check.md").read_text()


@pytest.mark.parametrize("quick", [False, True])
def test_references_come_before_what_is_compared_with_them(quick):
    made = zeroshot.runs(quick)
    names = [run.name for run in made]
    assert len(set(names)) == len(names)
    for i, run in enumerate(made):
        assert run.reference is None or run.reference in made[:i]
