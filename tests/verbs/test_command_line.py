"""The verbs: bad input ends with one line and code 2; every objective goes the whole way."""

import json
import math
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tiny_run
from random_run import make_run
from tiny_run import FILE, LENGTH, arguments, command

from esolm_jax.sampling.plan import prompts

ROOT = pathlib.Path(__file__).parents[2]
pytestmark = pytest.mark.fast_compile


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Fields of config.data that name prepared bytes, packed by `wrap`."""
    return tiny_run.write_data(tmp_path_factory.mktemp("wrap"))


@pytest.fixture(scope="module")
def padded(tmp_path_factory):
    return tiny_run.write_data(tmp_path_factory.mktemp("pad"), **{"data.packing": "pad"})


def trained(folder, fields, *args):
    args = [f"--workdir={folder}", f"--config={FILE}", *arguments(fields), *args]
    assert command("train", *args) == 0
    return folder


@pytest.fixture(scope="module")
def eso_b(data, tmp_path_factory):
    """A workdir with an Eso-LM (B) trained at alpha_0 = 0.5."""
    overrides = ["--config.sample.top_k", "7", "--config.sample.temperature=0.5"]
    return trained(tmp_path_factory.mktemp("eso_b"), data | {"objective": "eso_b"}, *overrides)


@pytest.fixture(scope="module")
def ar(data, tmp_path_factory):
    return trained(tmp_path_factory.mktemp("ar"), data | {"objective": "ar"})


@pytest.fixture(scope="module")
def mdlm(data, tmp_path_factory):
    """Random weights: all that is asked of it is refused."""
    return make_run(tmp_path_factory.mktemp("mdlm") / "run", **of_text(data, "mdlm"))


@pytest.fixture(scope="module")
def bd3(data, tmp_path_factory):
    """As mdlm."""
    return make_run(tmp_path_factory.mktemp("bd3") / "run", **of_text(data, "bd3"))


def of_text(data, objective: str) -> dict:
    return data | {"data.source": "text", "data.seq_len": LENGTH, "objective": objective}


@pytest.fixture
def refused(capsys):
    """refused(verb, args, *parts): the command ends with code 2 and one line with the parts."""

    def check(verb, args, *parts):
        capsys.readouterr()
        code = command(verb, *args)
        printed = capsys.readouterr()
        assert code == 2
        assert_one_line(printed.err, *parts)
        assert printed.out == ""

    return check


def assert_one_line(stderr, *parts):
    lines = stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), stderr
    for part in parts:
        assert part in lines[0]


def test_process_ends_with_code_2_and_one_line(tmp_path):
    def start(verb, *args):
        return subprocess.Popen(
            [sys.executable, "-m", f"esolm_jax.{verb}", f"--workdir={tmp_path}", *args],
            cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    processes = [
        (start("sample"), "no checkpoints here"),
        (start("train", f"--config={FILE}", "--config.alpha_0=2"), "config.alpha_0=2.0"),
    ]
    for process, told in processes:
        stdout, stderr = process.communicate(timeout=100)
        assert process.returncode == 2
        assert_one_line(stderr, told)
        assert stdout == ""


# Flags.


@pytest.mark.parametrize("verb", ["prepare", "train", "evaluate", "sample"])
def test_missing_workdir(refused, verb):
    refused(verb, [f"--config={FILE}"], "--workdir is missing", f"esolm_jax.{verb}")


@pytest.mark.parametrize("verb", ["prepare", "train"])
def test_missing_config(refused, verb, tmp_path):
    refused(verb, [f"--workdir={tmp_path}"], "--config is missing", f"esolm_jax.{verb}")


@pytest.mark.parametrize("verb", ["train", "sample"])
def test_no_such_config_file(refused, verb, tmp_path):
    args = [f"--workdir={tmp_path}", "--config=configs/nothing.py"]
    refused(verb, args, "--config=configs/nothing.py: no such file")


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("--config.alpha0=1", "config.alpha0: unknown field (did you mean 'alpha_0'?)"),
        (
            "--config.train.batchsize=1",
            "config.train.batchsize: unknown field (did you mean 'train",
        ),
        ("--config.model=1", "config.model: unknown field"),
        ("--config.zzz", "config.zzz: unknown field"),
        ("--config.alpha_0=2", "config.alpha_0=2.0: must be in [0, 1]"),
        ("--config.objective=eso_c", "one of ar, mdlm, bd3, eso_a, eso_b, mdlm_shifted (did you"),
        ("--config.alpha_0=half", "config.alpha_0"),
        ("--config.train.steps=1.5", "config.train.steps"),
        ("--config.train.steps=many", "config.train.steps"),
        ("--config.low_variance=2", "config.low_variance"),
        ("--confg=x", "confg"),
        ("stray", "'stray': must be a flag"),
    ],
)
def test_bad_flag(refused, override, told, tmp_path):
    refused("train", [f"--workdir={tmp_path}", f"--config={FILE}", override], told)


def test_overrides_reach_the_run(eso_b):
    saved = json.loads((eso_b / "config.json").read_text())
    assert saved["sample"]["top_k"] == 7 and saved["sample"]["temperature"] == 0.5
    assert saved["data"]["seq_len"] == LENGTH
    assert command("sample", f"--workdir={eso_b}", "--config.sample.top_k=6") == 0
    figures = json.loads((eso_b / "samples.json").read_text())
    used = figures["sample"]
    assert used["top_k"] == 6 and used["temperature"] == 0.5  # as saved


# Workdirs.


@pytest.mark.parametrize("verb", ["evaluate", "sample"])
def test_workdir_without_checkpoints(refused, verb, tmp_path):
    refused(verb, [f"--workdir={tmp_path}"], str(tmp_path), "no checkpoints here")
    refused(verb, [f"--workdir={tmp_path}/none"], "no checkpoints here")


@pytest.mark.parametrize("verb", ["evaluate", "sample"])
def test_checkpoints_folder_with_junk(refused, verb, tmp_path):
    folder = tmp_path / "checkpoints"
    (folder / "notes").mkdir(parents=True)
    (folder / "readme.txt").write_text("nothing")
    refused(verb, [f"--workdir={tmp_path}"], str(tmp_path), "no finished checkpoint")


@pytest.mark.parametrize("verb", ["evaluate", "sample", "train"])
def test_checkpoint_of_something_else(refused, verb, tmp_path, data):
    folder = tmp_path / "checkpoints" / "7"
    folder.mkdir(parents=True)
    (folder / "weights.bin").write_text("nothing")
    args = [f"--config={FILE}", *arguments(data)] if verb == "train" else []
    refused(verb, [f"--workdir={tmp_path}", *args], "checkpoints/7", "not a checkpoint")


def test_training_without_data(refused, tmp_path):
    refused("train", [f"--workdir={tmp_path}", f"--config={FILE}"], "esolm_jax.prepare")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [("data.seq_len", 32), ("data.packing", "pad"), ("data.source", "shakespeare")],
)
def test_training_on_data_prepared_otherwise(refused, data, tmp_path, name, value):
    args = arguments(data | {name: value})
    refused("train", [f"--workdir={tmp_path}", f"--config={FILE}", *args], f"config.{name}=")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("train.batch_size", 7),
        ("train.grad_accumulation", 3),
        ("mesh.devices", 64),
        ("mesh.data", 64),
        ("mesh.devices", 8),
    ],
)  # fmt: skip
def test_batch_that_does_not_fit_the_devices(refused, data, tmp_path, name, value):
    args = arguments(data | {"train.batch_size": 8, name: value})
    refused("train", [f"--workdir={tmp_path}", f"--config={FILE}", *args], "config.")
    assert list(tmp_path.iterdir()) == []


def test_batch_of_an_evaluation_that_does_not_fit_the_devices(refused, eso_b):
    args = ["--config.mesh.devices=8", "--config.eval.batch_size=4"]
    refused("evaluate", [f"--workdir={eso_b}", *args], "config.eval.batch_size=4", "fsdp = 8")


# Another model, another tokenizer, a question the family cannot answer.


@pytest.mark.parametrize("verb", ["evaluate", "sample"])
def test_another_objective_is_refused(refused, eso_b, verb):
    args = [f"--workdir={eso_b}", "--config.objective=mdlm", "--config.alpha_0=1"]
    refused(verb, args, "config.objective='mdlm': must be 'eso_b', as in the checkpoint")


@pytest.mark.parametrize("verb", ["evaluate", "sample"])
@pytest.mark.parametrize(("name", "value"), [("blocks", 2), ("width", 32), ("heads", 4)])
def test_config_file_of_another_model_is_refused(refused, eso_b, data, verb, name, value):
    args = [f"--config={FILE}", *arguments(data | {f"model.{name}": value})]
    refused(
        verb, [f"--workdir={eso_b}", *args], f"config.model.{name}={value}: must be", "as in the"
    )


def test_config_file_of_the_same_model_is_fine(eso_b, data):
    args = [f"--config={FILE}", *arguments(data | {"eval.max_windows": 8})]
    assert command("evaluate", f"--workdir={eso_b}", *args) == 0
    assert json.loads((eso_b / "evaluate.json").read_text())["windows"] == 8


def test_data_of_another_tokenizer_are_refused(refused, eso_b, tmp_path):
    sentencepiece = {"data.tokenizer": "sentencepiece", "data.vocab_size": 290}
    other = tiny_run.write_data(tmp_path, **sentencepiece)
    args = [f"--workdir={eso_b}", f"--config.data.dir={other['data.dir']}"]
    refused("evaluate", args, "config.data.tokenizer='bytes': must be 'sentencepiece'")
    refused(
        "evaluate",
        args + arguments(sentencepiece),
        "with the tokenizer of the checkpoint",
        "bytes of 259",
    )


@pytest.mark.parametrize("family", ["mdlm", "bd3"])
def test_importance_weighted_bound_is_for_any_order_models(refused, request, family):
    workdir = request.getfixturevalue(family)
    args = [f"--workdir={workdir}", "--config.eval.num_orders=2"]
    refused("evaluate", args, "config.eval.num_orders=2", f"objective {family}")


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("ar", {"sample.schedule": "strided"}),
        ("ar", {"sample.schedule": "shuffled_strided"}),
        ("ar", {"sample.steps": 4}),
        ("bd3", {"sample.schedule": "strided"}),
        ("bd3", {"sample.schedule": "shuffled_strided"}),
    ],
)
def test_schedule_that_the_family_has_not_is_refused(refused, request, family, fields):
    workdir = request.getfixturevalue(family)
    args = [f"--workdir={workdir}", *arguments(fields)]
    refused("sample", args, "config.sample.", f"objective {family}")


def test_alpha_0_may_differ_from_training(eso_b):
    overrides = ["--config.alpha_0=0.25", "--config.eval.num_orders=3"]
    assert command("evaluate", f"--workdir={eso_b}", *overrides) == 0
    figures = json.loads((eso_b / "evaluate.json").read_text())
    assert (figures["alpha_0"], figures["trained_alpha_0"]) == (0.25, 0.5)
    assert [result["bound"] for result in figures["results"]] == ["nelbo", "importance_weighted"]
    assert figures["results"][1]["num_orders"] == 3
    assert command("sample", f"--workdir={eso_b}", overrides[0]) == 0
    assert json.loads((eso_b / "samples.json").read_text())["alpha_0"] == 0.25


def test_raw_weights_are_not_the_average(eso_b):
    found = {}
    for which in ("raw", "ema"):
        assert command("evaluate", f"--workdir={eso_b}", f"--config.eval.weights={which}") == 0
        figures = json.loads((eso_b / "evaluate.json").read_text())
        assert figures["weights"] == which
        found[which] = figures["results"][0]["nll_per_token"]
    assert found["raw"] != found["ema"]


def test_workdir_can_be_moved(eso_b, tmp_path):
    moved = shutil.copytree(eso_b, tmp_path / "moved")
    assert command("sample", f"--workdir={moved}") == 0
    assert (moved / "samples.jsonl").is_file()


# The whole way.

WAYS = [
    ("ar", 0.0, "pad"),
    ("mdlm", 1.0, "wrap"),
    ("bd3", 1.0, "pad"),
    ("eso_a", 0.5, "wrap"),
    ("eso_a", 1.0, "wrap"),
    ("eso_b", 0.0, "wrap"),
    ("eso_b", 0.5, "pad"),
]


@pytest.mark.parametrize(("objective", "alpha_0", "packing"), WAYS)
def test_prepare_train_evaluate_sample(objective, alpha_0, packing, data, padded, tmp_path, capsys):
    fields = dict(data if packing == "wrap" else padded)
    if objective == "eso_b":  # the others train on data that are there already
        fields["data.dir"] = ""
    fields |= {"objective": objective, "alpha_0": alpha_0, "train.steps": 2}
    workdir, given = f"--workdir={tmp_path}", [f"--config={FILE}", *arguments(fields)]
    assert command("prepare", workdir, *given) == 0
    assert "next: python -m esolm_jax.train" in capsys.readouterr().out
    assert command("train", workdir, *given) == 0
    assert f"next: python -m esolm_jax.evaluate {workdir}" in capsys.readouterr().out
    assert (tmp_path / "learning_curve.png").stat().st_size > 1000
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    assert lines[0]["loss"] == pytest.approx(math.log(259), rel=0.6)  # untrained: uniform

    assert command("evaluate", workdir) == 0
    printed = capsys.readouterr().out
    figures = json.loads((tmp_path / "evaluate.json").read_text())
    check_evaluation(figures)
    assert f"perplexity {figures['results'][0]['perplexity']:.2f}" in printed
    assert f"next: python -m esolm_jax.sample {workdir}" in printed

    assert command("sample", workdir) == 0
    printed = capsys.readouterr().out
    figures = json.loads((tmp_path / "samples.json").read_text())
    samples = read_samples(tmp_path)
    check_samples(figures, samples)
    assert samples[0]["text"] in printed
    if alpha_0 == 0 or objective == "ar":
        assert [sample["order"] for sample in samples] == [list(range(LENGTH))] * 2


def check_evaluation(figures):
    assert figures["split"] == "test"
    assert 0 < figures["num_tokens"] <= figures["windows"] * LENGTH
    assert (figures["weights"], figures["step"], figures["seed"]) == ("ema", 2, 0)
    assert figures["unigram_perplexity"] > 1
    (result,) = figures["results"]
    exact = figures["alpha_0"] == 0  # left to right: no noise
    assert result["bound"] == ("exact" if exact else "nelbo")
    assert result["num_samples"] == (1 if exact else 2)
    assert result["num_tokens"] == figures["num_tokens"]
    assert result["perplexity"] == pytest.approx(math.exp(result["nll_per_token"]))
    assert result["bits_per_token"] == pytest.approx(result["nll_per_token"] / math.log(2))
    assert result["bits_per_byte"] > 0
    assert (result["standard_error"] == 0) == exact


def read_samples(workdir) -> list[dict]:
    lines = (workdir / "samples.jsonl").read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


def check_samples(figures, samples):
    assert len(samples) == 2
    token_ids, order = (np.array([s[name] for s in samples]) for name in ("token_ids", "order"))
    assert token_ids.shape == order.shape == (2, LENGTH)
    assert (0 <= token_ids).all() and (token_ids < 259).all()  # 259 is the mask
    assert (np.sort(order) == np.arange(LENGTH)).all()
    assert 1 <= figures["nfe"] <= LENGTH
    assert figures["seconds"] > 0
    assert figures["tokens_per_second"] == pytest.approx(2 * LENGTH / figures["seconds"])
    assert (figures["sample"]["seed"], figures["sample"]["weights"]) == (0, "ema")
    assert figures["step"] == 2


def test_samples_repeat_with_the_seed(eso_b):
    def sample(seed):
        assert command("sample", f"--workdir={eso_b}", f"--config.sample.seed={seed}") == 0
        return read_samples(eso_b)

    first, again, other = sample(3), sample(3), sample(4)
    assert first == again
    for name in ("token_ids", "order"):
        assert all(a[name] != b[name] for a, b in zip(first, other, strict=True))


def test_prompts_are_kept_and_the_rest_is_filled_in(eso_b, tmp_path, capsys):
    """From the command line and from a file, with a trace."""
    lines = [
        {"prompt": "ab[MASK:3]cd[MASK]", "seed": 5},
        {"text": "to be or not", "rewrite": [[3, 5]]},
    ]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    args = [f"--workdir={eso_b}", "--prompt=Hi", f"--prompts={file}", "--trace"]
    assert command("sample", *args) == 0
    printed = capsys.readouterr().out
    samples = read_samples(eso_b)
    assert [s["prompt"] for s in samples] == [0, 0, 1, 1, 2, 2]
    for s in samples[:2]:
        assert bytes(s["token_ids"][:2]) == b"Hi" and len(s["token_ids"]) == LENGTH
    for n, s in enumerate(samples[2:4]):
        ids = s["token_ids"]
        assert bytes(ids[:2] + ids[5:7]) == b"abcd" and len(ids) == 8 and s["seed"] == [5, n]
    for s in samples[4:]:
        assert bytes(s["token_ids"][:3]) == b"to " and bytes(s["token_ids"][5:]) == b" or not"
    for name in ("trace.html", "trace.png", "samples.jsonl"):
        assert f"wrote {eso_b}/{name}" in printed and (eso_b / name).stat().st_size > 0


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--prompt=" + "x" * (LENGTH + 1)], f"canvas of {LENGTH}"),
        (["--prompt=a[MASK:0]"], "n in 1..999999"),
        (["--prompt=a[MASK:-1]"], "[MASK:-1]"),
        (["--prompt=a[MASK:" + "9" * 5000 + "]"], "n in 1..999999"),
        (["--prompt=a[MASK:999999]"], f"canvas of {LENGTH}"),
        (["--prompts=nowhere.txt"], "no such file"),
        (["--prompts="], "is a folder"),
        (["--prompts=/dev/zero"], "is a device"),
        (["--prompt=a\n[MASK:0]"], "n in 1..999999"),
        (["--prompt=" + "[MASK:999999]" * 3000], f"canvas of {LENGTH}"),
        (["--config.sample.temperature=inf"], "config.sample.temperature=inf"),
        (["--config.sample.draft_tokens=1"], "config.sample.draft_tokens=1"),
        (
            ["--config.sample.draft_tokens=2", "--config.sample.steps=4"],
            "config.sample.steps=4: must be 0 with sample.loop speculative",
        ),
        (["--config.sample.block_length=4"], "blockwise"),
        (["--config.sample.tokens_per_pass=0"], "config.sample.tokens_per_pass=0"),
    ],
)
def test_bad_sampling_is_refused(refused, eso_b, options, told):
    refused("sample", [f"--workdir={eso_b}", *options], told)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("", "holds no prompts"),
        ("{", "not JSON"),
        ("[" * 100_000, "unsupported JSON"),
        ('["x"]', "must be an object"),
        ('{"prompt": "x", "text": "x"}', "must be an object"),
        ('{"prompt": "x", "rewrite": [[0, 1]]}', "must be an object"),
        ('{"prompt": "x", "prompt": "y"}', "'prompt' is repeated"),
        (r'{"prompt": "\ud800"}', "must be Unicode"),
        ('{"prompt": 1}', "prompt=1: fields are"),
        ('{"prompt": "x", "seed": true}', "seed=True: fields are"),
        ('{"prompt": "x", "seed": -1}', "seed=-1: must be in"),
        ('{"prompt": "x", "seed": 4294967296}', "seed=4294967296: must be in"),
        ('{"text": "to be", "rewrite": [3]}', "rewrite 3: must be"),
        ('{"text": "to be", "rewrite": [null]}', "rewrite None: must be"),
        ('{"text": "to be", "rewrite": [[0.5, 2]]}', "rewrite [0.5, 2]: must be"),
        ('{"text": "to be", "rewrite": [[true, 2]]}', "rewrite [True, 2]: must be"),
        ('{"text": "to be", "rewrite": [[1, "x"], [1, 2]]}', "rewrite [1, 'x']: must be"),
        ('{"text": "to be", "rewrite": [[0, 2], [1, 3]]}', "rewrite [1, 3]: must be"),
        ('{"text": "to be", "rewrite": [[0, 6]]}', "rewrite [0, 6]: must be"),
        ('{"text": "' + "x" * (3 * LENGTH) + '", "rewrite": [[0, 1]]}', f"canvas of {LENGTH}"),
        ('{"prompt": "' + "[MASK:999999]" * 3000 + '"}', f"canvas of {LENGTH}"),
        ('{"prompt": 1' + "0" * 4000 + "}", "prompt=1000"),
    ],
)
def test_bad_lines_of_prompts_are_refused(refused, eso_b, tmp_path, line, told):
    file = tmp_path / "prompts.jsonl"
    file.write_text(line)
    refused("sample", [f"--workdir={eso_b}", f"--prompts={file}"], str(file), told)


def test_special_files_and_large_ones_hold_no_prompts(refused, eso_b, tmp_path, monkeypatch):
    fifo, large, many = tmp_path / "fifo", tmp_path / "large.txt", tmp_path / "many.jsonl"
    os.mkfifo(fifo)
    with open(large, "wb") as file:
        file.truncate(2**34)  # a hole
    many.write_text('{"prompt": "x"}\n' * 5)
    monkeypatch.setattr(prompts, "MAX_PROMPTS", 4)
    args = [f"--workdir={eso_b}"]
    refused("sample", [*args, f"--prompts={fifo}"], str(fifo), "is a FIFO")
    refused("sample", [*args, f"--prompts={large}"], str(large), "must have at most 16 MiB")
    refused("sample", [*args, f"--prompts={many}"], str(many), "holds 5 prompts")
    monkeypatch.setattr(prompts, "MAX_PROMPTS", 5)
    monkeypatch.setattr(prompts, "MAX_TOKENS", 4)
    refused("sample", [*args, f"--prompts={many}"], f"{many}:5", "5 tokens: must be at most 4")


def test_what_unicode_calls_a_line_is_no_line_of_prompts(eso_b, tmp_path):
    """Nor is a byte order mark a part of the first."""
    file = tmp_path / "prompts.jsonl"
    file.write_text('\ufeff{"prompt": "a\u2028b"}\r\n{"prompt": "c"}\n', encoding="utf-8")
    assert command("sample", f"--workdir={eso_b}", f"--prompts={file}") == 0
    starts = [bytes(s["token_ids"]) for s in read_samples(eso_b)]
    wanted = ["a\u2028b".encode()] * 2 + [b"c"] * 2
    assert all(text.startswith(w) for text, w in zip(starts, wanted, strict=True))


@pytest.mark.parametrize(("verb", "name"), [("sample", "trace.png"), ("evaluate", "evaluate.json")])
def test_results_that_cannot_be_written_are_told_before(refused, eso_b, verb, name):
    (eso_b / name).unlink(missing_ok=True)
    (eso_b / name).mkdir()
    refused(verb, [f"--workdir={eso_b}"], f"{eso_b / name}: must be a file, not a folder")
    (eso_b / name).rmdir()


@pytest.mark.parametrize(
    "options",
    [
        {"draft_tokens": 3},
        {"loop": "speculative", "draft_style": "staircase", "draft_adaptive": True},
        {"loop": "confidence", "tokens_per_pass": 3, "confidence_threshold": 0.1},
        {
            "schedule": "blockwise",
            "block_length": LENGTH // 2,
            "length": 2 * LENGTH,
            "stop_at_eos": True,
        },
    ],
)
def test_ways_to_sample(eso_b, options):
    fields = arguments({f"sample.{name}": value for name, value in options.items()})
    assert command("sample", f"--workdir={eso_b}", *fields) == 0
    figures = json.loads((eso_b / "samples.json").read_text())
    length, samples = options.get("length", LENGTH), read_samples(eso_b)
    assert all(len(s["token_ids"]) == length or s["ended"] for s in samples)
    assert all(sorted(s["order"]) == list(range(len(s["token_ids"]))) for s in samples)
    assert 1 <= figures["nfe"] <= length
    assert figures["num_generated"] == sum(len(s["token_ids"]) for s in samples)
    if options.get("loop") == "confidence":
        assert all(s["order"] != sorted(s["order"]) for s in samples)
        assert figures["num_diffusion"] == [length] * len(samples)


@pytest.mark.parametrize("packing", ["wrap", "pad"])
def test_bits_per_byte_are_of_the_bytes_evaluated(data, padded, packing, ar, tmp_path):
    fields = data if packing == "wrap" else padded
    args = [f"--config={FILE}", *arguments(fields | {"objective": "ar", "eval.max_windows": 0})]
    assert command("evaluate", f"--workdir={ar}", *args) == 0
    (result,) = json.loads((ar / "evaluate.json").read_text())["results"]
    # A token of these data is one byte, or the EOS that closes a document.
    assert result["bits_per_byte"] >= result["bits_per_token"]
