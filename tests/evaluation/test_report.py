"""`evaluate --report` on a split and on a suite."""

import json
import re

import pytest
import tiny_run
from random_run import make_run
from tiny_run import command

from esolm_jax.data.manifest import load_manifest
from esolm_jax.training import checkpoint_meta

pytestmark = pytest.mark.fast_compile
refused = tiny_run.refused_by("evaluate")
SUITE = """title = "Two parts"
[defaults]
origin = "this test"
split = "test"
window_specials = "none"
document_end = "eos"
[data.first]
folder = "first"
[data.second]
folder = "second"
title = "Second part"
[data.third]
folder = "third"
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(workdir, fields) of a tiny Eso-LM (B) with random weights."""
    folder = tmp_path_factory.mktemp("report")
    fields = tiny_run.write_data(folder) | {"data.source": "text", "eval.max_windows": 0}
    fields["data.seq_len"] = tiny_run.LENGTH
    return make_run(folder / "work", **fields), fields


@pytest.fixture(scope="module")
def suite(run):
    """The flags of a suite of which two of three data sets are there."""
    root = run[0].parent / "root"
    lines = (run[0].parent / "text" / "test.jsonl").read_text().splitlines(keepends=True)
    for name, part in (("first", lines[:4]), ("second", lines[4:])):
        (root / name).mkdir(parents=True)
        (root / name / "test.jsonl").write_text("".join(part))
    (root / "two.toml").write_text(SUITE)
    return [f"--suite={root / 'two.toml'}", f"--data_root={root}"]


def report(workdir, *args):
    assert command("evaluate", f"--workdir={workdir}", "--report", *args) == 0
    return json.loads((workdir / "report.json").read_text(), parse_constant=pytest.fail)


@pytest.fixture(scope="module")
def first(run):
    """The report of the test split, on one device."""
    return report(run[0], "--config.eval.num_orders=2")


def test_report_of_a_split(run, first):
    workdir, fields = run
    found = first
    manifest = load_manifest(fields["data.dir"])
    (one,) = found["data_sets"]
    assert one["data"]["split_sha256"] == manifest.split("test")["sha256"]
    assert one["windows"] == manifest.split("test")["windows"] and one["unigram_perplexity"] > 1
    assert found["checkpoint_sha256"] == checkpoint_meta.digest_of(workdir, 7)
    assert "--report" in found["command"] and len(found["code_sha256"]) == 12
    nelbo, weighted = found["all"]["results"]
    assert (nelbo["bound"], nelbo["num_samples"]) == ("nelbo", 2)
    assert (weighted["bound"], weighted["num_orders"]) == ("importance_weighted", 2)
    nats = sum(row["nats"] for row in found["all"]["positions"])
    assert nats == pytest.approx(nelbo["nll_per_token"] * nelbo["num_tokens"], rel=1e-9)
    names = [group["group"] for group in found["all"]["calibration"]]
    assert names[0] == "all" and names[-1] == "sequential"
    assert not (workdir / "evaluate.json").exists()


def test_devices_and_batch_size_change_nothing(run, first, capsys):
    """Rows, tokens and the vocabulary are sharded; batches of 3 are rounded up."""
    workdir, _ = run
    axes = ["--config.mesh.tensor=2", "--config.mesh.sequence=2", "--config.mesh.devices=8"]
    found = report(workdir, *axes, "--config.eval.batch_size=3")
    printed = capsys.readouterr().out
    for one, other in zip(found["all"]["positions"], first["all"]["positions"], strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    pairs = zip(found["all"]["calibration"], first["all"]["calibration"], strict=True)
    for one, other in pairs:
        for name in ("predictions", "accuracy", "mean_confidence", "mean_entropy", "mean_nll"):
            assert one[name] == pytest.approx(other[name], rel=1e-5), name
    for name in ("report.md", "report.json", "report.png"):
        assert str(workdir / name) in printed and (workdir / name).stat().st_size > 1000
    assert "expected calibration error" in printed and "\nnext: python -m" in printed


def test_page_has_the_figures(run, first):
    del first  # or the test above
    found = json.loads((run[0] / "report.json").read_text())
    text = (run[0] / "report.md").read_text()
    assert text.startswith("# ") and re.search(r"at commit ([0-9a-f]{7}|unknown)", text)
    whole = found["all"]
    assert f"| {whole['results'][0]['perplexity']:.2f} " in text
    for row in whole["positions"]:
        assert f"| {row['first']}–{row['last']} | {row['tokens']:,} |" in text
    for group in whole["calibration"]:
        assert f"| {group['group']} | {group['predictions']:,} |" in text
    assert found["checkpoint_sha256"] in text and "](report.png)" in text


def test_domains_are_the_data_sets_of_a_suite(run, suite, capsys):
    workdir, _ = run
    found = report(workdir, *suite)
    printed = capsys.readouterr().out
    first, second = found["data_sets"]
    assert (first["title"], second["title"]) == ("first", "Second part")
    assert len(found["missing"]) == 1 and "missing: third: no .parquet" in printed
    for name in ("num_tokens", "nats", "predictions"):
        of_each = [total(one, name) for one in (first, second)]
        assert total(found["all"], name) == pytest.approx(sum(of_each), rel=1e-9)
    assert command("evaluate", f"--workdir={workdir}", *suite) == 0
    folder = workdir / "suites" / "two" / "all"
    of_suite = json.loads((folder / "report.json").read_text())["data_sets"]
    for one, other in zip((first, second), of_suite, strict=True):
        wanted = other["results"][0]["nll_per_token"]
        assert one["results"][0]["nll_per_token"] == pytest.approx(wanted, rel=1e-6)
    table = [line for line in (workdir / "report.md").read_text().splitlines() if "nelbo" in line]
    assert [line.split("|")[1].strip() for line in table[:3]] == ["first", "Second part", "all"]


def total(entry, name):
    """A sum over all windows of a data set, or of all of them."""
    if name == "num_tokens":
        return entry["results"][0]["num_tokens"]
    if name == "nats":
        return sum(row["nats"] for row in entry["positions"])
    return entry["calibration"][0]["predictions"]


@pytest.mark.parametrize(
    "args, message",
    [
        (["--answers=x.jsonl"], "--report: must be given without --answers, because"),
        (["--verify"], "--report: must be given without --verify, because"),
        (["--protocol=published"], "--report: must be given without --protocol=published, because"),
        (["--config.eval.metrics=sampler"], "config.eval.metrics='sampler': must be of nelbo and"),
        (["--data_root=/no"], "--suite is missing"),
    ],
)
def test_wrong_use(run, refused, args, message):
    refused([f"--workdir={run[0]}", "--report", *args], message)
