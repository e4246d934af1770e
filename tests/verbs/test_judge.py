"""The verb `judge`: its files and table, bad input, and `sample --judge`."""

import json
import math
import re

import numpy as np
import processes
import pytest
import tiny_run
from golden_eval import FOLDER
from thorough import thorough
from tiny_run import command, refused_by

import esolm_jax
from esolm_jax.errors import UserError
from esolm_jax.evaluation.protocol import Judge, judge_source

pytestmark = pytest.mark.fast_compile
JUDGE = FOLDER / "genppl" / "judge"
refused = refused_by("judge")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """An AR model of bytes after two steps."""
    folder = tmp_path_factory.mktemp("judge")
    fields = {"objective": "ar", "train.steps": 2, "train.eval_windows": 4, "data.packing": "pad"}
    data = tiny_run.write_data(folder, **{"data.packing": "pad"})
    tiny_run.train(tiny_run.make_config(data | fields), folder / "run")
    return folder / "run"


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_figures_and_table(tmp_path, capsys):
    texts = write(tmp_path / "texts.jsonl", {"text": "The lamp"}, "is lit", "")
    assert command("judge", f"--texts={texts}", f"--judge={JUDGE}", "--config.mesh.devices=2") == 0
    figures = json.loads((tmp_path / "texts.judge.json").read_text())
    assert (figures["num_texts"], figures["num_empty"]) == (3, 1)
    assert figures["devices"] == "2 cpu devices (data=2)"
    names = ["generative_perplexity", "entropy", "distinct", "repetition"]
    assert list(figures["metrics"]) == names
    printed = capsys.readouterr().out
    for name in names:
        assert f"{figures['metrics'][name]['summary']}\n" in printed
    perplexity = figures["metrics"]["generative_perplexity"]
    assert perplexity["perplexity"] == pytest.approx(
        math.exp(perplexity["nll"] / perplexity["num_tokens"])
    )


def test_chosen_metrics_references_and_file(tmp_path):
    texts = write(tmp_path / "texts.jsonl", "The lamp is lit", "Two gulls", "A letter")
    args = [f"--texts={texts}", f"--judge={JUDGE}", f"--references={texts}", "--clusters=2"]
    out = tmp_path / "out.json"
    assert command("judge", *args, "--metrics=mauve,entropy", f"--out={out}") == 0
    found = json.loads(out.read_text())["metrics"]
    assert list(found) == ["entropy", "mauve"] and found["mauve"]["mauve"] == pytest.approx(1)


def test_a_workdir_scores_every_token_with_its_own_likelihood(workdir):
    """The perplexity of ids, with EOS, is that of `log_likelihood`."""
    model, texts = esolm_jax.load(workdir), ["to be or not", "nobler"]
    ids = [[*model.tokenizer.encode(text), model.tokenizer.eos_id] for text in texts]
    padded = np.full((2, 16), model.tokenizer.eos_id, np.int32)
    scored = np.zeros(padded.shape, bool)
    for i, row in enumerate(ids):
        padded[i, : len(row)], scored[i, : len(row)] = row, True
    found = Judge(workdir).score(padded, scored).sum(axis=1)
    np.testing.assert_allclose(found, -model.log_likelihood(texts).values, rtol=1e-5)
    assert Judge(workdir).encode(["to[EOS]be"]) == [[*b"to", model.tokenizer.eos_id, *b"be"]]


def test_sample_judges_its_texts(workdir, capsys):
    assert command("sample", f"--workdir={workdir}", f"--judge={workdir}") == 0
    figures = json.loads((workdir / "samples.judge.json").read_text())
    assert f"{figures['metrics']['entropy']['summary']}\n" in capsys.readouterr().out
    texts = workdir / "samples.jsonl"
    assert command("judge", f"--texts={texts}", f"--judge={workdir}", f"--out={texts}.json") == 0
    again = json.loads((workdir / "samples.jsonl.json").read_text())
    assert again["metrics"] == figures["metrics"]


@pytest.mark.parametrize(
    "args, told",
    [
        ([], "--texts is missing"),
        (["--texts=TEXTS"], "--judge is missing"),
        (["--texts=nowhere.jsonl", f"--judge={JUDGE}"], "--texts=nowhere.jsonl: no such file"),
        (["--texts=TEXTS", "--judge=nowhere"], "nowhere: no judge: must be a folder"),
        (["--texts=TEXTS", f"--judge={JUDGE}", "--variant=poled"], "variant='poled'"),
        (["--texts=TEXTS", f"--judge={JUDGE}", "--metrics=mauve"], "must have references"),
        (["--texts=TEXTS", f"--judge={JUDGE}", "--references=no"], "--references=no: no such"),
        (["--texts=TEXTS", f"--judge={JUDGE}", "--batch_size=-1"], "batch_size=-1: must be a"),
        (["--texts=TEXTS", f"--judge={JUDGE}", "--out=/no/o.json"], "/no is read-only or missing"),
    ],
)
def test_bad_input(refused, tmp_path, args, told):
    texts = write(tmp_path / "texts.jsonl", "The lamp")
    refused([arg.replace("TEXTS", str(texts)) for arg in args], told)


def test_a_judge_without_a_tokenizer(refused, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((JUDGE / name).read_bytes())
    texts = write(tmp_path / "texts.jsonl", "The lamp")
    refused([f"--texts={texts}", f"--judge={tmp_path}"], "holds no tokenizer")


def test_a_workdir_of_another_family():
    with pytest.raises(UserError, match="objective eso_b: a judge must be ar"):
        judge_source.check(FOLDER.parent / "workdir_947f88e" / "run")


IN_PROCESSES = """
from tiny_run import command
sys.exit(command(*os.environ["ARGS"].split("|")))
"""


def in_two_processes(*each: list) -> list[tuple]:
    """(exit code, stdout, stderr) of a verb in two processes of two devices, given its name and
    arguments in each; without Gloo's lines."""
    paths, port = f"{processes.ROOT}:{processes.ROOT}/tests/support", processes.free_port()
    environment = {"PYTHONPATH": paths, "JAX_NUM_CPU_DEVICES": "2"}
    all_ = [
        processes.Processes(
            IN_PROCESSES, indices=[index], port=port, ARGS="|".join(args), **environment
        )
        for index, args in enumerate(each)
    ]
    ends = [one.wait()[0] for one in all_]
    return [(code, re.sub(r"\[Gloo\].*\n", "", out), err) for code, out, err in ends]


@thorough
def test_two_processes_find_the_figures_of_one(tmp_path):
    """Only process 0 prints and writes; other texts on another host are one error."""
    texts = write(tmp_path / "texts.jsonl", "The lamp is lit", "Two gulls", "", "A letter " * 9)
    args = ["judge", f"--texts={texts}", f"--judge={JUDGE}", f"--references={texts}"]
    assert command(*args, "--clusters=2") == 0
    file = tmp_path / "texts.judge.json"
    alone = json.loads(file.read_text())
    file.unlink()
    args += ["--clusters=2", "--config.mesh.fsdp=2"]
    (code, out, _), (other_code, other_out, _) = in_two_processes(args, args)
    assert (code, other_code, other_out) == (0, 0, "") and "generative_perplexity" in out
    both = json.loads(file.read_text())
    assert both["devices"] == "4 cpu devices (data=2, fsdp=2) in 2 processes"
    check_metrics(both["metrics"], alone["metrics"])
    another = [args[0], f"--texts={write(tmp_path / 'another.jsonl', 'The lamp')}", *args[2:]]
    for code, out, err in in_two_processes(args, another):
        assert (code, out) == (2, "") and err.count("\n") == 1
        assert err.startswith("error: --texts differs between hosts")


def check_metrics(found: dict, wanted: dict) -> None:
    for name, entry in wanted.items():
        numbers = {key: value for key, value in entry.items() if not isinstance(value, str)}
        own = {key: found[name][key] for key in numbers}
        assert own == pytest.approx(numbers, rel=1e-6, nan_ok=True)


@thorough
def test_two_processes_draw_and_judge_the_texts_of_one(workdir):
    args = ["sample", f"--workdir={workdir}", f"--judge={workdir}", "--config.sample.num_texts=4"]
    files = workdir / "samples.jsonl", workdir / "samples.judge.json"
    assert command(*args) == 0
    alone = [file.read_text() for file in files]
    args.append("--config.mesh.devices=0")
    (code, out, err), (other_code, other_out, _) = in_two_processes(args, args)
    assert (code, other_code, other_out) == (0, 0, "") and "--- sample 3" in out, err
    both = [file.read_text() for file in files]
    assert both[0] == alone[0]
    check_metrics(*(json.loads(text)["metrics"] for text in (both[1], alone[1])))
