"""Exported artefacts compute what the model computes, in runtimes of their own."""

import dataclasses
import hashlib
import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.export
import numpy as np
import onnx
import pytest
import tiny_run
from random_run import ADALN, LENGTH, PRETRAINED, VOCAB, make_run
from tiny_run import command, refused_by

from esolm_jax.data import wordpieces
from esolm_jax.data.tokenizer import Bytes
from esolm_jax.errors import UserError
from esolm_jax.interop import memory, safetensors_file
from esolm_jax.interop.export import (
    exported_sampler,
    onnx_graph,
    parity,
    plain,
    sampling_plan,
    stablehlo,
    weight_storage,
)
from esolm_jax.interop.export.shipped import (
    decode_loop,
    plain_transformer,
    run_stablehlo,
    schedule_esolm,
)
from esolm_jax.interop.published import config as published_config
from esolm_jax.interop.published import write as published_write
from esolm_jax.model.lm_head import exclude_mask_token
from esolm_jax.model.model_config import ModelConfig
from esolm_jax.parallel import sharding
from esolm_jax.sampling.engine import choose
from esolm_jax.sampling.engine import network as network_lib
from esolm_jax.sampling.engine.choose import TokenSampler
from esolm_jax.sampling.loops.loop import row_keys
from esolm_jax.sampling.plan.canvas import Canvas
from esolm_jax.training import checkpoint_meta

pytestmark = pytest.mark.fast_compile
ROOT = pathlib.Path(__file__).resolve().parents[2]
# Fields and formats. StableHLO is traced from the same source as NumPy runs: not every style needs
# both. ONNX graphs are built node by node: every style has one.
FAMILIES = {
    "eso_b": ({"objective": "eso_b", **ADALN}, "safetensors,stablehlo,onnx"),
    "gpt2": ({"objective": "ar", **PRETRAINED["gpt2"]}, "safetensors,onnx"),
    "llama3": (
        {"objective": "ar", "start_token": "mask", "sample.top_k": 9, "sample.top_p": 0.9}
        | PRETRAINED["llama3"],
        "safetensors,stablehlo,onnx",
    ),
    "qwen3": ({"objective": "eso_b", **PRETRAINED["qwen3"]}, "safetensors,onnx"),
    "bd3": ({"objective": "bd3", "block_length": 4}, "safetensors,stablehlo"),
    "eso_a": ({"objective": "eso_a", "model.cond_width": 8}, "stablehlo"),
    "mdlm": (
        {"objective": "mdlm", "sample.schedule": "strided", "sample.steps": 5},
        "safetensors,stablehlo,onnx",
    ),
}


@pytest.fixture(autouse=True, scope="module")
def shared_programs():
    """Keeps compiled programs between exports, which drop theirs to save memory.

    Exports in other processes and in test_hub_export.py do drop them.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "clear_jit_caches_and_trim", lambda: None)
        yield


def export(workdir, target, *args) -> dict:
    assert command("export", f"--workdir={workdir}", f"--to={target}", *args) == 0
    return json.loads((target / "manifest.json").read_text())


def trained(workdir, weights="ema"):
    config = checkpoint_meta.saved_config(workdir)
    return config, published_write.load(config, workdir, weights)


def measured(manifest) -> dict:
    """{(file, function): what was measured}."""
    return {(a["file"], a["function"]): a["parity"] for a in manifest["artefacts"]}


# Few tokens at a time, in strides, drawn from few.
NARROW = {"schedule": "strided", "steps": 5, "top_p": 0.8, "top_k": 7, "temperature": 0.6}
NARROW = {f"sample.{name}": value for name, value in NARROW.items()}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("export") / "run", **FAMILIES["eso_b"][0], **NARROW)


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    target = tmp_path_factory.mktemp("exported") / "out"
    manifest = export(run, target)
    return target, manifest


@pytest.fixture
def one_batch_size(monkeypatch):
    """Compiles less, where what matters is not the batch size, nor which accelerator."""
    monkeypatch.setattr(parity, "BATCHES", (3,))
    monkeypatch.setattr(stablehlo, "PLATFORMS", ("cpu",))


# Every artefact, in a process that has no esolm_jax.


@pytest.fixture(scope="module")
def expected(run):
    """Inputs for the other process, and what our own model and sampler make of them."""
    config, found = trained(run)
    model, batches = found.built.model, parity.examples(found.built.model, LENGTH)
    logits = parity.trained_logits(model, found.params, batches)
    network = network_lib.fold(plain.in_float32(model), found.params)
    texts = parity.Texts(config, found.built.special, network)
    given, want, rng = {}, {}, np.random.default_rng(3)
    for batch, tokens, logit in zip(parity.BATCHES, batches, logits, strict=True):
        names = "token", "position", "rank", "in_context"
        given |= {f"{n}_{batch}": a for n, a in zip(names, parity.labels(tokens), strict=True)}
        rows = rng.integers(0, VOCAB - 1, (batch, LENGTH)).astype(np.int32)
        given[f"rows_{batch}"] = np.where(rng.random(rows.shape) < 0.3, rows, -1)
        one = {"temperature": 0.0, "schedule": "ancestral", "steps": 0}
        want |= {f"logits_{batch}": logit}
        want[f"text_{batch}"] = texts.of(given[f"rows_{batch}"], 0, one)
        want[f"sample_{batch}"] = texts.of(given[f"rows_{batch}"], 0, {"temperature": 0.0})
    return given, want


@pytest.mark.parametrize("runtime", ["numpy", "onnx", "stablehlo"])
def test_runs_without_esolm_jax(exported, expected, runtime, tmp_path):
    given, want = expected
    np.savez(tmp_path / "in.npz", **given)
    script = [
        sys.executable,
        "-IB",
        ROOT / "tests/support/without_esolm_jax.py",
        exported[0],
        runtime,
    ]
    subprocess.run([*script, tmp_path / "in.npz", tmp_path / "out.npz"], check=True, cwd=tmp_path)
    got = dict(np.load(tmp_path / "out.npz"))
    for batch in (1, 5):
        assert np.abs(want[f"logits_{batch}"]).max() > 1  # so that 1e-4 means something
        np.testing.assert_allclose(
            got[f"logits_{batch}"], want[f"logits_{batch}"], rtol=0, atol=1e-4
        )
        for name in ("text", "sample") if runtime == "stablehlo" else ("text",):
            np.testing.assert_array_equal(got[f"{name}_{batch}"], want[f"{name}_{batch}"])


# The manifest.


def test_manifest(exported, run):
    target, manifest = exported
    _, found = trained(run)
    assert (manifest["step"], manifest["weights"], manifest["mask_id"]) == (7, "ema", 259)
    assert (manifest["objective"], manifest["vocab_size"]) == ("eso_b", VOCAB)
    assert (manifest["not_exported"], manifest["compiled"]) == ({}, [])
    assert manifest["tokenizer"]["fingerprint"] == Bytes.fingerprint
    present = {str(p.relative_to(target)) for p in target.rglob("*") if p.is_file()}
    assert present == manifest["files"].keys() | {"manifest.json"}
    assert "tokenizer/tokenizer.bytes" in present
    for name, about in manifest["files"].items():
        content = (target / name).read_bytes()
        assert about == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    files = {"weights.safetensors": {"score", "step"}, "score.stablehlo": {"score"}}
    files |= {"step.stablehlo": {"step"}, "sample.stablehlo": {"sample"}}
    files |= {"score.onnx": {"score"}, "step.onnx": {"step"}}
    assert measured(manifest).keys() == {(f, part) for f, parts in files.items() for part in parts}
    for (_, part), parity_ in measured(manifest).items():
        assert parity_["batch_sizes"] == [1, 5]
        assert part == "sample" or 0 < parity_["max_logit_error"] <= 1e-4
        assert part == "score" or parity_["greedy_identical"]
        assert part != "sample" or (parity_["drawn_identical"] and parity_["prompted_identical"])
    assert str(run) not in (target / "manifest.json").read_text()
    assert str(run) not in (target / "config.json").read_text()


def test_signatures_are_those_of_the_files(exported):
    """Names, shapes and dtypes in the manifest are what the runtimes say of the artefacts."""
    target, manifest = exported
    for entry in manifest["artefacts"]:
        path = target / entry["file"]
        if path.suffix == ".onnx":
            graph = onnx.load(path, load_external_data=False).graph
            for said, infos in ((entry["inputs"], graph.input), (entry["outputs"], graph.output)):
                assert [array["name"] for array in said] == [info.name for info in infos]
                for array, info in zip(said, infos, strict=True):
                    kind = info.type.tensor_type
                    dims = [d.dim_param or d.dim_value for d in kind.shape.dim]
                    dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
                    assert (array["shape"], array["dtype"]) == (dims, str(dtype))
        if path.suffix == ".stablehlo":
            read = jax.export.deserialize(bytearray(path.read_bytes()))
            assert read.platforms == ("cpu", "cuda", "tpu")
            weights = len(manifest["tensors"])
            for said, avals in (
                (entry["inputs"], read.in_avals[weights:]),
                (entry["outputs"], read.out_avals),
            ):
                got = [([_dim(d) for d in a.shape], str(a.dtype)) for a in avals]
                assert got == [(array["shape"], array["dtype"]) for array in said]


def _dim(dim):
    return dim if isinstance(dim, int) else str(dim)


def test_weights_under_both_names(exported, run):
    target, manifest = exported
    _, found = trained(run)
    tensors, about = safetensors_file.read(target / "weights.safetensors")
    assert {name: list(t.shape) for name, t in tensors.items()} == manifest["tensors"]
    folded = plain._named(network_lib.fold(plain.in_float32(found.built.model), found.params))
    for name, array in folded.items():
        np.testing.assert_allclose(np.asarray(tensors[name]), array, atol=1e-6, err_msg=name)
    assert not any("modulation" in name or "norm" in name for name in tensors)
    back = published_config.from_hyper(json.loads((target / "published.json").read_text()), "file")
    assert (back.objective, back.alpha_0, back.model.heads) == ("eso_b", 0.5, 2)
    assert (back.model.width, back.data.seq_len) == (16, LENGTH)
    assert (about["step"], about["weights"]) == (7, "ema")


def test_published_file_comes_back(exported, run, tmp_path, capsys):
    target, _ = exported
    work = [f"--workdir={tmp_path / 'back'}", f"--tokenizer={target / 'tokenizer'}"]
    assert command("convert", f"--from={target / 'published.safetensors'}", *work) == 0
    (_, want), (_, got) = trained(run), trained(tmp_path / "back")
    jax.tree.map(np.testing.assert_array_equal, want.params, got.params)


def test_raw_weights_are_other_weights(run, exported, tmp_path, capsys, one_batch_size):
    args = "--weights=raw", "--formats=safetensors", "--parts=score"
    manifest = export(run, tmp_path / "raw", *args)
    assert "the RAW weights, not the EMA, of step 7" in capsys.readouterr().out
    assert manifest["not_exported"]["step"] == "not requested"
    assert "one program is of the format stablehlo" in manifest["not_exported"]["sample"]
    raw, ema = (
        np.asarray(safetensors_file.read(folder / "weights.safetensors")[0]["embedding"])
        for folder in (tmp_path / "raw", exported[0])
    )
    np.testing.assert_array_equal(raw, trained(run, "raw")[1].params["embedding"]["embedding"])
    np.testing.assert_array_equal(ema, trained(run)[1].params["embedding"]["embedding"])


# The families.


@pytest.mark.parametrize("name", list(FAMILIES)[1:])
def test_families(name, tmp_path, capsys, one_batch_size):
    fields, formats = FAMILIES[name]
    run = make_run(tmp_path / "run", **fields)
    manifest = export(run, tmp_path / "out", f"--formats={formats}")
    assert "the EMA, not the raw weights, of step 7" in capsys.readouterr().out
    found, left_out = measured(manifest), manifest["not_exported"]
    assert all(a.get("max_logit_error", 0) <= 1e-4 for a in found.values())
    assert all(a.get("greedy_identical", True) for a in found.values())
    assert any("greedy_identical" in a for a in found.values())
    if "stablehlo" in formats:
        assert found["sample.stablehlo", "sample"]["drawn_identical"]
        assert found["sample.stablehlo", "sample"]["prompted_identical"]
    for suffix in {"onnx", "stablehlo"} & set(formats.split(",")):
        assert (f"score.{suffix}", "score") in found
        assert ((f"step.{suffix}", "step") in found) == (name != "mdlm")
    assert ("step" in left_out) == (name == "mdlm")
    published = (tmp_path / "out" / "published.safetensors").exists()
    assert published == (name not in PRETRAINED and "safetensors" in formats)
    assert ("published.safetensors" in left_out) == (name in PRETRAINED)
    notes = [entry["note"] for entry in manifest["artefacts"] if "note" in entry]
    assert len(notes) == (2 if name in ("eso_a", "bd3") else 0)
    assert name != "eso_a" or "exact in the sequential phase only" in notes[0]
    if name in PRETRAINED:
        _every_tensor_counts(tmp_path / "out", manifest["tensors"])


def _every_tensor_counts(folder, names):
    """Else a part that is forgotten would not show in the logits."""
    weights, about = plain_transformer.load(folder)
    assert ("positions" in weights) != ("rope" in weights)
    config = ModelConfig(vocab_size=VOCAB, width=1, blocks=1, heads=1, cond_width=0)
    labels = parity.labels(parity.examples(config, LENGTH)[0])
    logits = plain_transformer.score(weights, about["network"], *labels)
    for name in names:
        other = weights | {name: weights[name] * np.float32(1.02)}
        off = np.abs(plain_transformer.score(other, about["network"], *labels) - logits).max()
        assert off > 10 * parity.TOLERANCE, name


# One sampler in every runtime: its distribution and its texts. Its orders: test_hub_export.py.


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.7, 0, 0.9), (1.3, 5, 1.0), (0.5, 20, 0.8), (1e-30, 0, 0.9), (1e30, 0, 1.0)],
)
def test_distribution_of_a_step_is_the_same_in_every_runtime(temperature, top_k, top_p):
    logits = np.random.default_rng(0).normal(0, 3, (2, 3, VOCAB)).astype(np.float32)
    mask_id = VOCAB - 1
    choice = TokenSampler(mask_id=mask_id, temperature=temperature, top_p=top_p, top_k=top_k)
    want = np.exp(np.asarray(choice.log_probs(logits), np.float64))
    s = {"mask_id": mask_id, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    of_numpy = decode_loop.filtered(s, logits)  # and of run_onnx.py
    of_program = exported_sampler.filtered(
        exclude_mask_token(logits, mask_id),
        np.float32(temperature),
        np.int32(top_k),
        np.float32(top_p),
    )
    for got in (of_numpy, np.asarray(of_program)):
        got = np.exp(np.float64(got) - np.float64(got).max(axis=-1, keepdims=True))
        np.testing.assert_allclose(got / got.sum(axis=-1, keepdims=True), want, atol=2e-6)
    assert (want[..., mask_id] == 0).all() and (top_k == 0 or (want > 0).sum() <= 6 * top_k)
    choose = decode_loop.chooser(s, decode_loop.row_keys(0, 2))
    drawn = choose(logits, np.tile(np.arange(3), (2, 1)))
    assert (np.take_along_axis(want, drawn[..., None], axis=-1) > 0).all()


def test_draws_are_those_of_jax():
    """Keys of rows and positions, and the noise of a token, in its tails, too."""
    canvas_seeds = Canvas.empty(3, 4, 11).seeds
    keys = row_keys(canvas_seeds)
    np.testing.assert_array_equal(jax.random.key_data(keys), decode_loop.row_keys(11, 3))
    np.testing.assert_array_equal(
        jax.random.key_data(row_keys(canvas_seeds[1:])), decode_loop.row_keys(11, 2, 1)
    )
    position = np.array([[0, 5], [7, 1], [2, 2]], np.int32)
    ours = choose.gumbel(choose.keys_of(keys, position), 20_000)
    folded = decode_loop.fold_in(decode_loop.row_keys(11, 3)[:, None], position)
    np.testing.assert_allclose(decode_loop.gumbel(folded, 20_000), ours, rtol=2e-6, atol=2e-6)


def printed_texts(folder, runtime, *args):
    """Of a shipped script in a process of its own, elsewhere."""
    script = [sys.executable, "-IB", folder / f"run_{runtime}.py", *args]
    done = subprocess.run(script, check=True, cwd="/", capture_output=True, text=True)
    return done.stdout


@pytest.mark.parametrize("runtime", ["stablehlo", "numpy", "onnx"])
def test_shipped_scripts_print_what_sample_generates(run, exported, runtime):
    """The texts of the same seed, drawn with all options, around and behind prompts."""
    options = {"alpha_0": 0.6, "schedule": "ancestral", "steps": 4, "temperature": 0.9}
    options |= {"top_k": 20, "top_p": 0.95}
    config = {name: "" if name == "alpha_0" else "sample." for name in options}
    flags = [f"--config.{config[name]}{name}={value}" for name, value in options.items()]
    prompts = "ab[MASK:6]xyz[MASK]", "once"
    ours = []
    for prompt in prompts:
        seed = ["--config.sample.seed=11", "--config.sample.num_texts=2", f"--prompt={prompt}"]
        assert command("sample", f"--workdir={run}", *seed, *flags) == 0
        lines = (run / "samples.jsonl").read_text().splitlines()
        ours.append([json.loads(line) for line in lines])
    arguments = ["--seed=11", "--num_texts=2", *(f"--{k}={v}" for k, v in options.items())]
    for prompt, texts in zip(prompts, ours, strict=True):
        printed = printed_texts(exported[0], runtime, prompt, "--ids", *arguments)
        ids = [json.loads(line) for line in printed.splitlines()]
        assert ids == [text["token_ids"] for text in texts] and ids[0] != ids[1]
    printed = printed_texts(exported[0], runtime, prompts[0], *arguments, "--num_texts=1")
    assert printed == ours[0][0]["text"] + "\n"


@pytest.mark.parametrize("package", ["onnxruntime-node", "onnxruntime-web"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_javascript_prints_what_sample_generates(run, tmp_path, package, dtype, one_batch_size):
    """The same greedy texts. ESOLM_NODE: a folder with node_modules/onnxruntime-node or -web."""
    modules = pathlib.Path(os.environ.get("ESOLM_NODE", "")) / "node_modules"
    if not shutil.which("node") or not (modules / package).is_dir():
        pytest.skip(f"needs node, and {package} in ESOLM_NODE")
    export(run, tmp_path / "out", "--formats=onnx", f"--dtype={dtype}")
    (tmp_path / "node_modules").mkdir()
    for entry in modules.iterdir():
        if not entry.name.startswith("onnxruntime-") or entry.name in (package, _COMMON):
            (tmp_path / "node_modules" / entry.name).symlink_to(entry)
    prompt = "ab[MASK:6]xyz[MASK]"
    greedy = "--config.sample.temperature=0", "--config.sample.num_texts=2"
    assert command("sample", f"--workdir={run}", f"--prompt={prompt}", *greedy) == 0
    lines = (run / "samples.jsonl").read_text().splitlines()
    script = ["node", tmp_path / "out" / "run_onnx.mjs", prompt, "--temperature=0"]
    for args, key in (["--ids", "--num_texts=2"], "token_ids"), (["--num_texts=1"], "text"):
        done = subprocess.run(
            [*script, *args], check=True, cwd=tmp_path, capture_output=True, text=True
        )
        ours = [json.loads(line)[key] for line in lines]
        if key == "text":
            assert done.stdout == ours[0] + "\n"
        else:
            assert [json.loads(line) for line in done.stdout.splitlines()] == ours


_COMMON = "onnxruntime-common"


def test_config_says_how_scripts_generate(exported, run, tmp_path, one_batch_size):
    plan = exported[1]["sampling"]
    assert plan == json.loads((exported[0] / "config.json").read_text())["sampling"]
    names = "schedule", "steps", "temperature", "top_k", "top_p", "note", "has_step"
    assert [plan[name] for name in names] == ["strided", 5, 0.6, 7, 0.8, "", True]
    assert plan["onnx_cache_dtype"] == "float32"
    loop = "--config.sample.loop=confidence", "--config.sample.schedule=ancestral"
    args = "--formats=safetensors", "--parts=step", "--config.sample.steps=0", *loop
    plan = export(run, tmp_path / "out", *args)["sampling"]
    assert plan["schedule"] == "ancestral" and "sample.loop=confidence" in plan["note"]


# The types of weights.


# Networks of every kind: two norms, learned positions and rotation, shared and normed keys.
ROUNDED = {
    "bfloat16": ("eso_b", "safetensors,stablehlo,onnx", 2),
    "float16": ("qwen3", "safetensors,stablehlo,onnx", 2),
    "int8": ("gpt2", "safetensors,stablehlo,onnx", 1),
}


@pytest.mark.parametrize("dtype", ROUNDED)
def test_rounded_weights(tmp_path, capsys, one_batch_size, dtype):
    family, formats, bytes_per_weight = ROUNDED[dtype]
    run = make_run(tmp_path / "run", **FAMILIES[family][0])
    target = tmp_path / "out"
    manifest = export(run, target, f"--dtype={dtype}", f"--formats={formats}")
    out = capsys.readouterr().out
    assert f"weights are stored in {dtype}" in out and "% of greedy tokens equal" in out
    figures = measured(manifest)
    steps = {file: f for (file, part), f in figures.items() if part == "step"}
    assert steps.keys() == {"weights.safetensors", "step.stablehlo", "step.onnx"}
    for found in steps.values():
        assert 1e-4 < found["max_logit_error"] < 1  # it is rounded
        assert 0 < found["perplexity_change"] < 1e-2 and found["greedy_agreement"] > 0.7
        assert found["perplexity"] == pytest.approx(
            steps["weights.safetensors"]["perplexity"], rel=1e-6
        )
    # The runtimes differ in the rounding of activations only.
    changes = [found["perplexity_change"] for found in steps.values()]
    assert max(changes) < 4 * min(changes) + 1e-6
    assert figures["sample.stablehlo", "sample"]["greedy_agreement"] > 0.7
    config, found = trained(run)
    exact = dict(plain.tensors(found.built.model, found.params))
    tensors, _ = safetensors_file.read(target / "weights.safetensors")
    assert tensors["blocks.0.qkv"].type_name == ("I8" if dtype == "int8" else dtype)
    rounded = [name for name in exact if weight_storage._is_rounded(name)]
    for name, tensor in tensors.items():
        assert name in rounded or tensor.type_name == "float32", name
    for name in rounded:
        assert tensors[name].nbytes == bytes_per_weight * exact[name].size
    read = plain_transformer.read_safetensors(target / "weights.safetensors")
    relative = {"bfloat16": 2**-8, "float16": 2**-11, "int8": 0.51 / 127}[dtype]
    for name, array in exact.items():
        bound = relative * np.abs(array).max() if dtype == "int8" else relative * np.abs(array)
        assert (np.abs(read[name] - array) <= bound + 1e-7).all(), name
    is_published = family == "eso_b" and dtype != "int8"
    assert (target / "published.safetensors").exists() == is_published
    if is_published:
        tensors, _ = safetensors_file.read(target / "published.safetensors")
        kinds = {len(tensor.shape): tensor.type_name for tensor in tensors.values()}
        assert kinds == {1: "float32", 2: dtype}


def test_int8_codes_are_of_each_channel():
    """A channel of small weights keeps its own precision."""
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(8, 6)).astype(np.float32) * 10.0 ** np.arange(6, dtype=np.float32)
    stored = dict(weight_storage._stored("blocks.0.mlp_out", kernel, "int8"))
    codes, scale = stored["blocks.0.mlp_out"], stored["blocks.0.mlp_out_scale"]
    assert codes.dtype == np.int8 and (np.abs(codes).max(axis=0) == 127).all()
    assert (np.abs(codes * scale[None] - kernel) <= 0.51 * scale[None]).all()
    table = dict(weight_storage._stored("embedding", kernel.T, "int8"))
    assert table["embedding_scale"].shape == (6,)
    np.testing.assert_array_equal(table["embedding"], codes.T)


def test_weights_that_a_type_cannot_hold(refused, run, tmp_path, monkeypatch, one_batch_size):
    args = [f"--workdir={run}", f"--to={tmp_path / 'out'}", "--formats=safetensors"]
    refused([*args, "--dtype=int4"], "--dtype=int4: must be one of float32, bfloat16, float16")
    refused([*args, "--perplexity_tolerance=-1"], "--perplexity_tolerance=-1.0: must be above 0")
    told = "perplexity changes by", "(--perplexity_tolerance); nothing was exported"
    refused([*args, "--dtype=int8", "--perplexity_tolerance=1e-7"], *told)
    score = "--parts=score", "--dtype=int8", "--perplexity_tolerance=1e-7"
    refused([*args, *score], *told)  # the weights are checked with every part
    array = np.full((2, 2), 1e5, np.float32)
    with pytest.raises(
        UserError, match="--dtype=float16: must hold all weights, but one of logits"
    ):
        list(weight_storage._stored("logits", array, "float16"))
    assert not (tmp_path / "out").exists()


def test_scripts_are_those_of_the_parts(run, tmp_path, capsys, one_batch_size):
    """No script without its artefact."""
    target = tmp_path / "out"
    export(run, target, "--formats=onnx", "--parts=score")
    scripts = {path.name for path in target.glob("run_*")}
    assert scripts == {"run_numpy.py"}
    assert f"python {target}/run_numpy.py 'PROMPT'" in capsys.readouterr().out


@pytest.mark.parametrize("mask_id", [0, 5])
def test_prompts_of_the_sampler_hold_no_mask(mask_id):
    s = {"one_token": True, "length": 40, "vocab_size": 6, "mask_id": mask_id}
    s |= {"schedules": ["left_to_right"], "rank_block": 1}

    class Texts:
        def of(self, rows, seed, settings):
            return rows

    made = parity.make_reference(Texts(), s, with_sampler=True, is_rounded=False)
    (case,) = made.sampled["prompted"]
    assert (case.rows[:, 10:] == -1).all()
    assert set(np.unique(case.rows[:, :10])) == set(range(6)) - {mask_id}


def test_prompt_is_read_in_passes_of_its_own(run):
    """A long prompt does not widen the windows of the other passes."""
    s = sampling_plan.of_artefacts(*_network_of(run), "float32") | {"length": 12}
    s = schedule_esolm.checked(s, {"schedule": "ancestral", "steps": 4, "top_k": 2**40}, 12)
    rows = np.full((2, 12), -1, np.int32)
    rows[0, :8] = rows[1, 2:9] = 3
    passes = schedule_esolm.plan_passes(s, rows >= 0, 0)
    keys, _, top_k, _, text, order, *tables = run_stablehlo.arguments(
        s, passes, rows, decode_loop.row_keys(0, 2)
    )
    assert (len(keys), top_k, text.shape, order.shape) == (2, VOCAB, (2, 12), (2, 12))
    shapes = [[array.shape for array in tables[i : i + 3]] for i in (0, 3, 6)]
    assert [shape[0][0] for shape in shapes[:1]] == [1] and shapes[0][1:] == [(8,), (1,)]
    assert all(shape[1][0] <= 5 for shape in shapes[1:])
    every = np.concatenate([tables[i] for i in (0, 3, 6)])
    empty = (every[:, 0] == 12).all(axis=1)  # a pass behind the text, of an empty table
    assert (~empty).sum() == len(passes.size) and not every[empty][:, 2].any()


def _network_of(run):
    config, found = trained(run)
    return config, found.built.model, found.built.special


def test_files_compile_for_a_tpu(tmp_path, capsys, one_batch_size):
    """As they were written, without a device. The run is that of test_rounded_weights."""
    pytest.importorskip("libtpu")
    run = make_run(tmp_path / "run", **FAMILIES["eso_b"][0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stablehlo, "PLATFORMS", ("cpu", "tpu"))
        args = "--formats=stablehlo", "--compile_for=v5e:2x2", "--dtype=bfloat16"
        manifest = export(run, tmp_path / "out", *args)
    assert "compiles for v5e:2x2" in capsys.readouterr().out
    compiled = {row["file"]: row for row in manifest["compiled"]}
    assert compiled.keys() == {"score.stablehlo", "step.stablehlo", "sample.stablehlo"}
    for row in compiled.values():
        assert row["topology"] == "v5e:2x2" and row["hbm"]["arguments"] > 0


def test_sharded_checkpoint_on_one_device(exported, tmp_path):
    axes = {"data": 1, "fsdp": 4, "tensor": 2, "sequence": 1, "devices": 8}
    fields = FAMILIES["eso_b"][0] | {f"mesh.{name}": size for name, size in axes.items()}
    mesh = sharding.make_mesh(tiny_run.make_config(fields).mesh)
    sharded = make_run(tmp_path / "run", mesh, **fields)
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    args = [f"--workdir={sharded}", f"--to={tmp_path / 'out'}", "--formats=safetensors"]
    subprocess.run([sys.executable, "-m", "esolm_jax.export", *args], check=True, env=env, cwd=ROOT)
    for name in ("published.safetensors", "weights.safetensors"):
        folders = tmp_path / "out", exported[0]
        got, want = (safetensors_file.read(folder / name)[0] for folder in folders)
        for key, tensor in want.items():
            np.testing.assert_allclose(np.asarray(got[key]), np.asarray(tensor), atol=1e-6)


# Bad input, and artefacts that are wrong.


refused = refused_by("export")


def test_bad_flags(refused, run, tmp_path):
    work = f"--workdir={run}"
    refused([f"--to={tmp_path / 'out'}"], "--workdir is missing")
    refused([work], "--to is missing")
    out = f"--to={tmp_path / 'out'}"
    refused([f"--workdir={tmp_path}", out], "no checkpoints here")
    refused([work, out, "--weights=both"], "--weights=both: must be one of ema, raw")
    refused(
        [work, out, "--formats=onnx,gguf"], "--formats=gguf: must be one of safetensors, stablehlo"
    )
    refused([work, out, "--parts=train"], "--parts=train: must be one of score, step, sample")
    refused([work, out, "--tolerance=0"], "--tolerance=0.0: must be above 0")
    refused([work, out, "--compile_for=v5e"], "--compile_for=v5e: must be one of")
    onnx_only = "--compile_for=v5e:2x2", "--formats=onnx"
    refused([work, out, *onnx_only], "--compile_for=v5e:2x2: needs stablehlo in --formats")
    refused([work, "--to=hub", "--tolerance=1"], "--tolerance=1.0: must be left out with --to=hub")
    refused([work, out, "--formats=onnx", "--parts=sample"], "is of the format stablehlo")
    refused([work, out, "--config.model.heads=1"], "config.model.heads=1")


def test_target_that_is_not_empty(refused, run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes").touch()
    refused(
        [f"--workdir={run}", f"--to={tmp_path / 'out'}"],
        "must be a new or empty folder, but holds notes",
    )
    refused(
        [f"--workdir={run}", f"--to={tmp_path / 'out' / 'notes'}"],
        "must be a new or empty folder, not a file",
    )


def test_mdlm_has_no_cached_step(refused, tmp_path):
    run = make_run(tmp_path / "run", **FAMILIES["mdlm"][0])
    args = [f"--workdir={run}", f"--to={tmp_path / 'out'}", "--parts=score,step"]
    refused(args, "--parts=step: cannot be exported: objective mdlm has no cached step")


def test_tokenizer_that_does_not_match(refused, run, tmp_path):
    other = shutil.copytree(run, tmp_path / "run")
    args = [f"--workdir={other}", f"--to={tmp_path / 'out'}"]
    (other / "tokenizer" / "tokenizer.bytes").unlink()
    refused(args, "holds no tokenizer")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]
    (other / "tokenizer" / "vocab.txt").write_text("\n".join(words) + "\n")
    wordpieces.read(other / "tokenizer").save(other / "tokenizer")
    refused(
        args, "must be the tokenizer of the checkpoint (bytes of 259 tokens", "not bert of 7 tokens"
    )


def test_unknown_part_of_a_model(run, monkeypatch):
    found = trained(run)[1]
    config = found.built.model
    odd = dataclasses.make_dataclass(
        "Odd", [("sliding", int, 0)], bases=(ModelConfig,), frozen=True
    )
    plain.check(odd(**vars(config)))
    with pytest.raises(UserError, match="model.sliding=64: cannot be exported yet; must be 0"):
        plain.check(odd(**vars(config), sliding=64))
    with pytest.raises(UserError, match="config.model.style='t5': cannot be exported yet"):
        plain.check(dataclasses.replace(config, style="t5"))
    known = tuple(part for part in plain.PARTS if part != "mlp_out_bias")
    monkeypatch.setattr(plain, "PARTS", known)
    with pytest.raises(UserError, match=r"cannot be exported yet: blocks\.\d\.mlp_out_bias"):
        plain.shapes(config, found.params)


def _worse(function):
    """The same tensors, one of them a little off."""

    def tensors(*args):
        for name, array in function(*args):
            yield name, array * np.float32(1.01 if name == "blocks.0.mlp_out" else 1)

    return tensors


def test_parity_that_fails(refused, run, tmp_path, monkeypatch, one_batch_size):
    args = [f"--workdir={run}", f"--to={tmp_path / 'out'}"]
    with monkeypatch.context() as patch:
        patch.setattr(plain, "tensors", _worse(plain.tensors))
        told = "must be at most 0.0001 (--tolerance); nothing was exported"
        refused([*args, "--formats=safetensors"], "weights.safetensors (score)", told)
        rounded = "--formats=safetensors", "--dtype=int8"
        refused([*args, *rounded], "weights.safetensors (float32)", told)
    with monkeypatch.context() as patch:
        patch.setattr(onnx_graph, "MASKED", 0.0)
        refused([*args, "--formats=onnx"], "score.onnx (score)", told)
    with monkeypatch.context() as patch:
        patch.setattr(onnx_graph, "EMPTY_RANK", -1)  # empty slots are read
        refused([*args, "--formats=onnx", "--parts=step"], "step.onnx (step)", told)
    with monkeypatch.context() as patch:
        pick = exported_sampler._pick
        later = lambda logits, *a, **k: pick(-logits, *a, **k)  # noqa: E731
        patch.setattr(exported_sampler, "_pick", later)
        refused(
            [*args, "--formats=stablehlo", "--parts=sample"],
            "greedy texts differ from those of `sample`",
        )


def test_missing_extra(refused, run, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "onnxruntime" else find(name)
    )
    args = [f"--workdir={run}", f"--to={tmp_path / 'out'}"]
    refused(args, "onnx needs onnxruntime", "pip install -e '.[export]'")


def test_objective_of_the_published_code_round_trips():
    for objective in ("ar", "mdlm", "bd3", "eso_a", "eso_b"):
        config = tiny_run.make_config({"objective": objective})
        back = published_config.from_hyper(published_config.to_hyper(config), "file")
        assert (back.objective, back.alpha_0) == (objective, config.alpha_0)
        assert back.model.blocks == config.model.blocks
