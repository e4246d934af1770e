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
from esolm_jax.interop import safetensors_file
from esolm_jax.interop.export import (
    exported_sampler,
    onnx_graph,
    parity,
    plain,
    sampling_plan,
    stablehlo,
)
from esolm_jax.interop.export.shipped import decode_loop, plain_transformer
from esolm_jax.interop.published import config as published_config
from esolm_jax.interop.published import write as published_write
from esolm_jax.model.lm_head import exclude_mask_token
from esolm_jax.model.model_config import ModelConfig
from esolm_jax.parallel import sharding
from esolm_jax.sampling import generate
from esolm_jax.sampling.engine import choose
from esolm_jax.sampling.engine import network as network_lib
from esolm_jax.sampling.engine.choose import TokenSampler
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
    plan = sampling_plan.make(config, found, with_schedule=True)
    texts = parity.Texts(config, plan, found.built.special, network)
    given, want, rng = {}, {}, np.random.default_rng(3)
    for batch, tokens, logit in zip(parity.BATCHES, batches, logits, strict=True):
        names = "token", "position", "rank", "in_context"
        given |= {f"{n}_{batch}": a for n, a in zip(names, parity.labels(tokens), strict=True)}
        order = np.argsort(rng.random((batch, LENGTH)), axis=1).astype(np.int32)
        keys = rng.integers(0, 2**32, (batch, 2), np.uint32)
        given |= {f"order_{batch}": order, f"keys_{batch}": keys}
        text = texts.of(order, LENGTH, sizes=plan.sizes)
        want |= {f"logits_{batch}": logit, f"text_{batch}": text}
    return given, want, texts


@pytest.mark.parametrize("runtime", ["numpy", "onnx", "stablehlo"])
def test_runs_without_esolm_jax(exported, expected, runtime, tmp_path):
    given, want, texts = expected
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
        np.testing.assert_array_equal(got[f"text_{batch}"], want[f"text_{batch}"])
        if runtime == "stablehlo":
            order = got[f"sample_order_{batch}"]
            ours = texts.of(order, LENGTH, sizes=texts.plan.sizes)
            np.testing.assert_array_equal(got[f"sample_{batch}"], ours)


# The manifest.


def test_manifest(exported, run):
    target, manifest = exported
    _, found = trained(run)
    assert (manifest["step"], manifest["weights"], manifest["mask_id"]) == (7, "ema", 259)
    assert (manifest["objective"], manifest["vocab_size"]) == ("eso_b", VOCAB)
    assert manifest["not_exported"] == {}
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
        assert part != "sample" or parity_["sampled_identical"]
    assert str(run) not in (target / "manifest.json").read_text()
    assert str(run) not in (target / "config.json").read_text()


def test_signatures_are_those_of_the_files(exported):
    """Names, shapes and dtypes in the manifest, beside what the runtimes say of the artefacts."""
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
        assert found["sample.stablehlo", "sample"]["sampled_identical"]
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


# One sampler in every runtime: its orders, its distribution, its texts.


def plan_of(run, **fields):
    config, found = trained(run)
    sample = tiny_run.get_config().sample
    fields = {name: sample[name.split(".")[1]] for name in NARROW} | fields
    with config.unlocked():
        config.update_from_flattened_dict(fields)
    return config, sampling_plan.make(config, found, with_schedule=True)


@pytest.mark.parametrize(
    "fields",
    [
        {"alpha_0": 0.25},
        {"alpha_0": 1.0},
        {"sample.schedule": "left_to_right"},
        {"sample.schedule": "strided", "sample.steps": 5},
        {"objective": "bd3", "alpha_0": 1.0, "block_length": 4},
        {"objective": "ar", "alpha_0": 0.0},
    ],
)
def test_orders_are_those_of_sample(run, fields):
    """Of the same seed; from NumPy alone."""
    config, plan = plan_of(run, **fields)
    order, num_diffusion = decode_loop.draw_orders(plan.about, 7, 40)
    ours = generate.make_schedule(config, Canvas.empty(40, LENGTH, 7))
    np.testing.assert_array_equal(order, ours.order)
    np.testing.assert_array_equal(num_diffusion, ours.num_diffusion)
    sizes = [size for *_, size in decode_loop.passes(plan.about)]
    assert tuple(sizes) == plan.sizes == tuple(ours.sizes[:, 0])


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.7, 0, 0.9), (1.3, 5, 1.0), (0.5, 20, 0.8), (1e-30, 0, 0.9), (1e30, 0, 1.0)],
)
def test_distribution_of_a_step_is_the_same_in_every_runtime(temperature, top_k, top_p):
    logits = np.random.default_rng(0).normal(0, 3, (2, 3, VOCAB)).astype(np.float32)
    mask_id = VOCAB - 1
    choice = TokenSampler(mask_id=mask_id, temperature=temperature, top_p=top_p, top_k=top_k)
    want = np.exp(np.asarray(choice.log_probs(logits), np.float64))
    plan = {"mask_id": mask_id, "top_k": top_k, "top_p": top_p}
    of_numpy = decode_loop.filtered(plan, logits, temperature)  # and of run_onnx.py
    of_program = exported_sampler.filtered(
        exclude_mask_token(logits, mask_id), np.float32(temperature), top_k=top_k, top_p=top_p
    )
    for got in (of_numpy, np.asarray(of_program, np.float64)):
        got = np.exp(got - got.max(axis=-1, keepdims=True))
        np.testing.assert_allclose(got / got.sum(axis=-1, keepdims=True), want, atol=2e-6)
    assert (want[..., mask_id] == 0).all() and (top_k == 0 or (want > 0).sum() <= 6 * top_k)
    drawn = decode_loop.chooser(plan, temperature, np.random.default_rng(0))(logits)
    assert (np.take_along_axis(want, drawn[..., None], axis=-1) > 0).all()


def printed_texts(folder, runtime, *args):
    """Of a shipped script in a process of its own, elsewhere."""
    script = [sys.executable, "-IB", folder / f"run_{runtime}.py", *args]
    done = subprocess.run(script, check=True, cwd="/", capture_output=True, text=True)
    texts = [json.loads(line) for line in done.stdout.splitlines()]
    rows = np.array(texts)
    assert rows.shape == (3, LENGTH) and rows.min() >= 0 and rows.max() < VOCAB - 1
    return texts


def test_shipped_scripts_draw_what_sample_draws(run, exported, capsys):
    """run_stablehlo.py has our noise: the same texts of the same seed. Greedily, all have."""
    out = exported[0]
    ours = {}
    for name, args in {"greedy": ["--config.sample.temperature=0"], "drawn": []}.items():
        seed = ["--config.sample.seed=11", "--config.sample.num_texts=3"]
        assert command("sample", f"--workdir={run}", *seed, *args) == 0
        lines = (run / "samples.jsonl").read_text().splitlines()
        ours[name] = [json.loads(line)["token_ids"] for line in lines]
    assert ours["greedy"] != ours["drawn"]
    assert printed_texts(out, "stablehlo", "3", "11") == ours["drawn"]
    for runtime in ("stablehlo", "numpy", "onnx"):
        assert printed_texts(out, runtime, "3", "11", "0") == ours["greedy"]
    drawn = printed_texts(out, "numpy", "3", "11")
    assert drawn == printed_texts(out, "onnx", "3", "11")
    for texts in (drawn, ours["drawn"]):
        assert len(np.unique(texts, axis=0)) == 3


def test_manifest_says_what_is_drawn_from(exported, run, tmp_path, one_batch_size):
    plan = exported[1]["sampling"]
    assert plan == json.loads((exported[0] / "config.json").read_text())["sampling"]
    names = "schedule", "temperature", "top_k", "top_p", "schedule_note"
    assert [plan[name] for name in names] == ["strided", 0.6, 7, 0.8, ""]
    assert plan["passes"] == [[3, 2], [1, 6]] or sum(s * n for s, n in plan["passes"]) == LENGTH
    loop = "--config.sample.loop=confidence", "--config.sample.schedule=ancestral"
    args = "--formats=safetensors", "--parts=step", "--config.sample.steps=0", *loop
    plan = export(run, tmp_path / "out", *args)["sampling"]
    assert plan["schedule"] == "ancestral" and "loop=confidence" in plan["schedule_note"]


@pytest.mark.parametrize("temperature", ["nan", "-1", "inf"])
def test_temperature_that_is_none(temperature):
    with pytest.raises(SystemExit, match="must be at least 0, and finite"):
        decode_loop.read_temperature(temperature)


@pytest.mark.parametrize("temperature", [0.0, 1e-40, 1e-30, 0.5, 1e30, 1e39])
def test_temperature_is_that_of_sample(temperature):
    bounded = decode_loop.read_temperature(str(temperature))
    low, high = choose.BOUNDS
    assert bounded == (temperature and min(max(temperature, low), high))


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
    refused([work, out, "--formats=onnx", "--parts=sample"], "is of the format stablehlo")
    schedule = "--config.sample.loop=confidence"
    refused([work, out, schedule, "--parts=sample"], "--parts=sample: cannot be exported")
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
