"""evaluate.json says what its figures are of: data, part, checkpoint; and every run is kept."""

import json
import math

import pytest
import tiny_run
from tiny_run import FILE, arguments, command

from esolm_jax.data.manifest import load_manifest
from esolm_jax.evaluation import provenance
from esolm_jax.training import checkpoint_meta

pytestmark = pytest.mark.fast_compile


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(workdir, fields) of a tiny Eso-LM (B)."""
    folder = tmp_path_factory.mktemp("run")
    fields = tiny_run.write_data(folder) | {"train.steps": 2, "eval.max_windows": 0}
    args = [f"--workdir={folder / 'work'}", f"--config={FILE}", *arguments(fields)]
    assert command("train", *args) == 0
    return folder / "work", fields


def evaluate(workdir, **fields) -> dict:
    assert command("evaluate", f"--workdir={workdir}", *arguments(fields)) == 0
    return json.loads((workdir / "evaluate.json").read_text())


def history(workdir) -> list[dict]:
    lines = (workdir / "evaluations.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=pytest.fail) for line in lines]


def test_every_evaluation_is_kept(run):
    workdir, _ = run
    (workdir / "evaluations.jsonl").unlink(missing_ok=True)
    first = evaluate(workdir, seed=3)
    second = evaluate(workdir, seed=4, **{"eval.num_orders": 2})
    assert history(workdir) == [first, second]
    assert [figures["seed"] for figures in history(workdir)] == [3, 4]


def test_data_batch_size_and_checkpoint_are_named(run, capsys):
    workdir, fields = run
    manifest = load_manifest(fields["data.dir"])
    figures = evaluate(workdir)
    data, test = figures["data"], manifest.splits["test"]
    assert (data["source"], data["source_hash"]) == (manifest.source, manifest.source_hash)
    assert data["files"]["test"] == fields["data.test"]
    assert (data["split"], data["split_sha256"]) == ("test", test["sha256"])
    assert data["windows"] == data["split_windows"] == test["windows"] and data["whole_split"]
    assert data["tokenizer"] == manifest.tokenizer["fingerprint"]
    assert figures["batch_size"] == 8
    assert figures["checkpoint_sha256"] == checkpoint_meta.digest_of(workdir, 2)
    assert len(figures["checkpoint_sha256"]) == 64
    printed = capsys.readouterr().out
    assert f"all {test['windows']} windows of the test split; a unigram model has" in printed


def test_part_of_a_split_is_called_one(run, capsys):
    workdir, fields = run
    total = load_manifest(fields["data.dir"]).splits["test"]["windows"]
    figures = evaluate(workdir, **{"eval.max_windows": 6})
    (result,) = figures["results"]
    assert (figures["data"]["windows"], figures["data"]["whole_split"]) == (6, False)
    assert result["standard_error_of_split"] >= result["standard_error"] > 0
    assert result["standard_error_differences"] == 1  # one batch, two draws
    assert result["bits_per_byte_note"]
    printed = capsys.readouterr().out
    assert f"6 of the {total} windows of the test split" in printed
    assert "(Monte Carlo, from 1 difference)" in printed
    assert "(as a figure of the whole split), about " in printed
    (whole,) = evaluate(workdir)["results"]
    assert whole["standard_error_of_split"] is None and not whole["bits_per_byte_note"]


@pytest.mark.parametrize("fields", [{"eval.num_samples": 1}, {"eval.num_orders": 1}])
def test_error_of_one_draw_is_null_and_says_why(run, fields):
    result = evaluate(run[0], **fields)["results"][-1]
    (field,) = fields
    assert result["standard_error"] is None
    assert f"set config.{field} to 2 or more" in result["standard_error_note"]


# The unigram model.


def test_unigram_model_is_of_the_models_own_text(run):
    figures = evaluate(run[0])
    assert figures["unigram_perplexity"] > 1 and figures["unigram_note"] == ""
    assert evaluate(run[0], **{"eval.split": "train"})["unigram_perplexity"] > 1


def test_set_for_testing_alone_has_no_unigram_model(run, tmp_path, capsys):
    """Its train split, which `prepare` needs, is the text that is evaluated."""
    workdir, fields = run
    only = {f"data.{split}": fields["data.test"] for split in ("train", "validation", "test")}
    only |= {"data.dir": str(tmp_path / "data")}
    args = [f"--workdir={tmp_path}", f"--config={FILE}", *arguments(fields | only)]
    assert command("prepare", *args) == 0
    figures = evaluate(workdir, **only)
    assert figures["unigram_perplexity"] is None
    assert "not the text that the model was trained on" in figures["unigram_note"]
    assert f"no unigram perplexity: {figures['unigram_note']}" in capsys.readouterr().out


def test_unigram_model_of_a_checkpoint_that_does_not_say(run):
    manifest = load_manifest(run[1]["data.dir"])
    meta = checkpoint_meta.read_meta(run[0])
    assert provenance.unigram(manifest, meta, "test", 0)[0] > 1
    old = {name: value for name, value in meta.items() if name != "training_data"}
    assert provenance.unigram(manifest, old, "test", 0)[0] > 1
    old["config"]["data"]["train"] = "another.txt"
    value, note = provenance.unigram(manifest, old, "test", 0)
    assert value is None and "another config.data.train than the model's" in note
    value, note = provenance.unigram(manifest, old | {"converted": True}, "test", 0)
    assert value is None and "is not known" in note


# The history.


def test_torn_line_stays_a_line_of_its_own(tmp_path):
    path = tmp_path / "lines.jsonl"
    provenance.append_line(path, {"a": 1})
    path.write_bytes(path.read_bytes() + b'{"a": 2')
    provenance.append_line(path, {"a": math.nan, "b": "é\n"})
    first, torn, last = path.read_bytes().split(b"\n")[:-1]
    assert json.loads(first) == {"a": 1} and torn == b'{"a": 2'
    assert json.loads(last) == {"a": None, "b": "é\n"}
