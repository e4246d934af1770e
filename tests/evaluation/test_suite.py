"""`evaluate --suite`: the zero-shot table on small files in the published formats."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from tiny_run import FILE, arguments, command, write_data

from esolm_jax.data.manifest import load_manifest
from esolm_jax.errors import UserError
from esolm_jax.evaluation import protocol
from esolm_jax.evaluation.suite import suite_file, suite_run

pytestmark = pytest.mark.fast_compile
FIRST = ("ptb", "wikitext103", "lambada")  # those that have files at first
WORDS = "it 's N N @-@ one “ a b ” ( c ) word , longer words . $ 1 ?".split()


def texts(seed, count):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(1, 9))) for _ in range(count)]


def write_table(path, field, rows):
    path.parent.mkdir(parents=True)
    parquet.write_table(pa.table({field: pa.array(rows, pa.string())}), path)


def write_files(root):
    """Small files as the hub and OpenAI name them, of FIRST."""
    write_table(root / "ptb_text_only" / "validation-00000-of-00001.parquet", "sentence",
                texts(1, 9))  # fmt: skip
    wikitext = root / "wikitext" / "wikitext-103-raw-v1"
    rows = ["", " = Title = \n", "", *(f" {text} \n" for text in texts(2, 5)), ""]
    write_table(wikitext / "validation-00000-of-00001.parquet", "text", rows)
    (wikitext / "train-00000-of-00001.parquet").write_bytes(b"not read")
    (root / "lambada").mkdir()
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts(3, 4))
    (root / "lambada" / "lambada_test.jsonl").write_text(lines)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A workdir, of eso_b, and a folder of data."""
    folder = tmp_path_factory.mktemp("suite")
    workdir, root = folder / "run", folder / "data_root"
    fields = write_data(folder) | {"train.steps": 2}
    root.mkdir()
    assert command("train", f"--config={FILE}", f"--workdir={workdir}", *arguments(fields)) == 0
    shutil.rmtree(fields["data.dir"])  # a suite does not need it
    write_files(root)
    return workdir, root


def run(trained, *args, code=0, suite="zeroshot"):
    workdir, root = trained
    given = [f"--workdir={workdir}", f"--suite={suite}", f"--data_root={root}"]
    assert command("evaluate", *given, *args) == code


def report(trained, name="all"):
    return json.loads((trained[0] / "suites" / "zeroshot" / name / "report.json").read_text())


def figures(found, name="nll_per_token"):
    return {entry["name"]: [r[name] for r in entry["results"]] for entry in found["data_sets"]}


@pytest.fixture(scope="module")
def first(trained):
    """The report of the first run, with both bounds."""
    run(trained, "--config.eval.num_orders=2", "--config.eval.batch_size=64")
    return report(trained)


def test_report_has_every_bound_of_every_data_set(first, trained):
    assert tuple(entry["name"] for entry in first["data_sets"]) == FIRST
    for entry in first["data_sets"]:
        nelbo, weighted = entry["results"]
        assert (nelbo["bound"], nelbo["num_samples"]) == ("nelbo", 2)
        assert (weighted["bound"], weighted["num_orders"]) == ("importance_weighted", 2)
        for result in entry["results"]:
            assert result["perplexity"] == pytest.approx(np.exp(result["nll_per_token"]))
            assert result["standard_error"] > 0 and result["num_tokens"] > 0
    assert len(first["missing"]) == 5
    assert "AG News: no .parquet, .arrow, .jsonl or .txt with 'test' in its name below" in str(
        first["missing"]
    )
    folder = trained[0] / "suites" / "zeroshot" / "all"
    assert (folder / "report.png").stat().st_size > 1000
    table = [line for line in (folder / "report.md").read_text().splitlines() if line[:1] == "|"]
    assert len(table) == 2 + 2 * len(FIRST)


def test_windows_are_those_of_the_table(first, trained):
    """BOS, the next tokens of all detokenized documents, EOS: no EOS between, nothing dropped."""
    folder = trained[0] / "suites" / "zeroshot" / "data"
    for name, seed, count in (("ptb", 1, 9), ("lambada", 3, 4)):
        manifest = load_manifest(folder / f"{name}-16-all")
        joined = "".join(protocol.detokenize(name, text) for text in texts(seed, count)).encode()
        entry = manifest.splits["test"]
        assert list(manifest.splits) == ["test"]
        assert entry["windows"] == -(-len(joined) // 14)
        assert entry["tokens"] == len(joined) + 2 * entry["windows"]


def test_batch_size_and_devices_change_nothing(first, trained):
    """Batches of 3 on 8 devices are rounded up to 8; 64 on one device before."""
    shutil.rmtree(trained[0] / "suites" / "zeroshot" / "all")
    sizes = ["--config.eval.batch_size=3", "--config.mesh.devices=8"]
    run(trained, *sizes, "--config.eval.num_orders=2")
    found = figures(report(trained))
    for name, values in figures(first).items():
        np.testing.assert_allclose(found[name], values, rtol=1e-6, err_msg=name)


def test_what_is_done_is_not_done_again(first, trained, capsys, monkeypatch):
    """A run that ends in the middle goes on; a new data set and new settings are evaluated."""
    workdir, root = trained
    evaluate, done = suite_run._evaluate, []

    def fail_on_the_second(config, manifest, model, estimators, data_set):
        if len(done) == 1:
            raise UserError("killed")
        done.append(data_set.name)
        return evaluate(config, manifest, model, estimators, data_set)

    shutil.rmtree(workdir / "suites")
    monkeypatch.setattr(suite_run, "_evaluate", fail_on_the_second)
    run(trained, code=2)
    assert done == ["ptb"]
    monkeypatch.undo()
    capsys.readouterr()
    run(trained)
    out = capsys.readouterr().out
    assert out.count("done before") == 1 and "PTB: done before" in out
    assert out.count("missing: ") == 5 and out.index("missing: ") < out.index("done before")
    again = report(trained)
    write_table(root / "ag_news" / "data" / "test-00000-of-00001.parquet", "text", texts(4, 6))
    run(trained)
    out = capsys.readouterr().out
    assert out.count("done before") == 3 and out.count("missing: ") == 4
    assert figures(report(trained)).items() > figures(again).items()
    run(trained, "--config.seed=1")
    assert "done before" not in capsys.readouterr().out


def test_published_protocol(first, trained):
    run(trained, "--protocol=published", "--config.eval.batch_size=4")
    found = report(trained, "published")
    manifest = load_manifest(trained[0] / "suites" / "zeroshot" / "data" / "ptb-16-published")
    entry = manifest.splits["test"]
    joined = "".join(protocol.detokenize("ptb", text) for text in texts(1, 9)).encode()
    assert entry["windows"] == len(joined) // 14 and entry["tokens"] == 16 * entry["windows"]
    assert entry["dropped_tokens"] == len(joined) % 14
    (ptb,) = found["data_sets"][0]["results"]
    assert (ptb["bound"], ptb["num_samples"], ptb["kappa"]) == ("published_nelbo", 1, 0.5)
    assert ptb["num_tokens"] == entry["tokens"] and ptb["standard_error"] > 0
    shutil.rmtree(trained[0] / "suites" / "zeroshot" / "published")
    sizes = ["--config.eval.batch_size=4", "--config.mesh.devices=8"]  # batches are padded
    run(trained, "--protocol=published", *sizes)
    again = figures(report(trained, "published"))
    for name, values in figures(found).items():
        np.testing.assert_allclose(again[name], values, rtol=1e-6, err_msg=name)


def test_evaluate_needs_a_test_set_alone(trained, tmp_path, capsys):
    """The command that `prepare` prints evaluates a model on text that has no train split."""
    (tmp_path / "a.txt").write_text("one line\n\nthe last line\n")
    given = [f"--config.data.test={tmp_path}/a.txt", "--config.data.document=line"]
    assert command("prepare", f"--config={FILE}", f"--workdir={tmp_path}/own", *given) == 0
    printed = capsys.readouterr().out.splitlines()[-1]
    assert printed.startswith("next: python -m esolm_jax.evaluate --workdir=MODEL ")
    args = printed.replace("MODEL", str(trained[0])).split()[4:]
    assert command("evaluate", *args) == 0
    found = json.loads((trained[0] / "evaluate.json").read_text())
    assert (found["data"]["split_documents"], found["data"]["document"]) == (2, "line")
    assert found["num_tokens"] == len("one line") + len("the last line") + 2
    assert "there is none" in found["unigram_note"]


@pytest.mark.parametrize(
    "args, message",
    [
        (["--protocol=publshed"], "--protocol=publshed: must be all or published (did you mean"),
        (["--data_root=/no/such"], "--data_root=/no/such: no such folder"),
        (["--suite=zeroshto"], "--suite=zeroshto: must be zeroshot or a TOML file (did you mean"),
        (["--suite="], "--suite is missing: --data_root and --protocol belong to a suite"),
        (["--data_root="], "--data_root is missing"),
        (["--config.eval.metrics=importance_weighted"], "config.eval.metrics='importance_weighted"),
        (
            ["--protocol=published", "--config.eval.batch_size=1"],
            "config.eval.batch_size=1: leaves a last batch of 1",
        ),
    ],
)
def test_bad_flags(first, trained, args, message, capsys):
    capsys.readouterr()
    run(trained, *args, code=2)
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error")]
    assert message in line


def test_no_files_at_all_are_told_in_one_line(trained, tmp_path, capsys):
    capsys.readouterr()
    run((trained[0], tmp_path), code=2)
    (line,) = capsys.readouterr().err.splitlines()
    assert "has the files of no data set" in line and "ptb_text_only, split validation" in line


SUITE = """title = "Mine"
[data.a]
origin = "me"
folder = "a"
split = "test"
"""


@pytest.mark.parametrize(
    "text, message",
    [
        (SUITE + "detokeniser = 'ptb'", "data.a: detokeniser: unknown; .*mean 'detokenizer'"),
        (SUITE + "detokenizer = 'ptp'", "data.a: detokenizer='ptp': must be one of .*mean 'ptb'"),
        (SUITE + "range = '[5:'", r"data.a: range='\[5:': must end with a range"),
        (SUITE + "keep_blank = 'no'", "data.a: keep_blank='no': must be bool"),
        ("[data.a]\norigin = 'me'", "data.a: folder: is missing"),
        ("title = 'x'", r"must have a table \[data.NAME\]"),
        ("a = ", "not TOML"),
        ("[dat.a]", "dat: unknown; must be one of title, defaults, data, published"),
        (
            SUITE + "[[published]]\nmodel='m'\nsource='s'\nperplexity={b=1.0}",
            "published: perplexity: b: unknown; must be one of a",
        ),
    ],
)
def test_a_typo_in_a_suite_file_is_told(tmp_path, text, message):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(UserError, match=f"--suite=.*mine.toml: {message}"):
        suite_file.read(str(path))


def test_a_suite_of_the_user(first, trained, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "my-test.txt").write_text("\n".join(texts(5, 20)))
    (tmp_path / "mine.toml").write_text(SUITE + 'range = "[5:]"\ndocument_end = "eos"\n')
    run((trained[0], tmp_path), suite=str(tmp_path / "mine.toml"))
    folder = trained[0] / "suites" / "mine"
    (entry,) = json.loads((folder / "all" / "report.json").read_text())["data_sets"]
    assert entry["data"]["split_documents"] == 15 and entry["data"]["document_end"] == "eos"
