"""Published checkpoints → a workdir → published names: nothing lost, nothing guessed."""

import json
import os
import pathlib
import pickle
import shutil
import zipfile

import numpy as np
import published_toy
import pytest
import safetensors.numpy
import tiny_run
from golden_files import close, vectors
from published_toy import FOLDER, STEP
from tiny_run import command, refused_by

from esolm_jax.errors import UserError
from esolm_jax.family import eso_b
from esolm_jax.interop.published import config as published_config
from esolm_jax.interop.published import file as published_file
from esolm_jax.interop.published.names import INV_FREQ, PublishedModel
from esolm_jax.model import build
from esolm_jax.parallel import sharding
from esolm_jax.training import checkpoint_meta, restore

pytestmark = pytest.mark.fast_compile
CKPT = FOLDER / "esolm.ckpt"
ONE = "--config.mesh.devices=1"


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    return published_toy.write_gpt2(tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="module")
def converted(tmp_path_factory, gpt2):
    """The workdir of the Lightning checkpoint."""
    workdir = tmp_path_factory.mktemp("converted") / "run"
    assert convert(CKPT, workdir, gpt2) == 0
    return workdir


def convert(source, workdir, tokenizer, *args):
    given = [f"--tokenizer={tokenizer}"] if tokenizer else []
    return command("convert", f"--from={source}", f"--workdir={workdir}", *given, *args, ONE)


def exported(workdir, target, *args):
    """The tensors that a workdir gives, without the prefix."""
    assert command("convert", f"--workdir={workdir}", f"--to={target}", *args) == 0
    tensors = safetensors.numpy.load_file(target)
    assert all(name.startswith("backbone.") for name in tensors)
    return {name.removeprefix("backbone."): array for name, array in tensors.items()}


def assert_same(got, want):
    assert got.keys() - {INV_FREQ} == want.keys() - {INV_FREQ}
    for name, array in want.items():
        assert got[name].dtype == np.float32
        np.testing.assert_array_equal(got[name], array, err_msg=name)


refused = refused_by("convert")


# Round trips.


def test_lightning_checkpoint_and_back(converted, tmp_path):
    assert_same(exported(converted, tmp_path / "raw.safetensors", "--weights=raw"), toy(0))
    assert_same(exported(converted, tmp_path / "ema.safetensors"), toy(1))


def toy(seed):
    return published_toy.weights(seed)


@pytest.mark.parametrize(("weights", "seed"), [("ema", 1), ("raw", 0)])
def test_one_of_the_two_sets(tmp_path, gpt2, weights, seed, capsys):
    assert convert(CKPT, tmp_path / "run", gpt2, f"--weights={weights}") == 0
    assert f"converted the {weights.replace('ema', 'EMA')}" in capsys.readouterr().out
    for name in ("ema", "raw"):
        out = tmp_path / f"{name}.safetensors"
        assert_same(exported(tmp_path / "run", out, f"--weights={name}"), toy(seed))


def test_own_export_needs_no_config(converted, tmp_path):
    first = exported(converted, tmp_path / "first.safetensors")
    back, tokenizer = tmp_path / "back", converted / "tokenizer"
    assert convert(tmp_path / "first.safetensors", back, tokenizer) == 0
    assert_same(exported(back, tmp_path / "second.safetensors"), first)
    saved, again = (checkpoint_meta.read_meta(folder) for folder in (converted, back))
    assert again["tokenizer"] == saved["tokenizer"]
    paths = {"tokenizer_path"}
    for section, fields in saved["config"].items():
        if section == "data":
            fields, now = ({k: v for k, v in d.items() if k not in paths} for d in
                           (fields, again["config"]["data"]))  # fmt: skip
            assert now == fields
        else:
            assert again["config"][section] == fields
    assert str(converted) not in (tmp_path / "first.safetensors").read_bytes().decode("latin1")


GOLDEN = ["--config.model.width=64", "--config.model.blocks=2", "--config.model.heads=4"]
GOLDEN += ["--config.model.cond_width=32", "--config.data.seq_len=32"]


@pytest.fixture
def golden_run(tmp_path):
    """golden_run(name, *args): a workdir with golden weights, out of a safetensors file."""

    def make(name, *args):
        tensors = {key: np.ascontiguousarray(array) for key, array in vectors(name).items()}
        source = tmp_path / f"{name}.safetensors"
        safetensors.numpy.save_file(tensors, source)
        bert = published_toy.write_bert(tmp_path / "bert")
        workdir = tmp_path / name
        given = [f"--config={tiny_run.FILE}", *GOLDEN, *args]
        assert convert(source, workdir, bert / "vocab.txt", *given) == 0
        return workdir

    return make


def restored(workdir) -> PublishedModel:
    config = checkpoint_meta.saved_config(workdir)
    mesh = sharding.make_mesh(config.mesh)
    trained = restore.load_trained(config, workdir, "ema", mesh)
    return PublishedModel(trained.built.model, trained.params, trained.built.special.mask)


def test_golden_logits_and_names_through_a_workdir(golden_run, tmp_path):
    workdir = golden_run("weights_dit")
    model, golden = restored(workdir), vectors("01_diffusion_causal")
    masked, order = golden["zt"] == 66, golden["sort_idx"]
    ones = np.ones_like(masked)
    labelled = eso_b.label_diffusion(golden["x0"], ones, masked, order, masked, mask=66)
    tokens = labelled.tokens
    got = model.logits(tokens.token, tokens.position, tokens.rank, tokens.in_context)
    close(got, golden["logits"])
    names = exported(workdir, tmp_path / "out.safetensors")
    assert_same(names, vectors("weights_dit"))
    np.testing.assert_array_equal(names[INV_FREQ], vectors("weights_dit")[INV_FREQ])


def test_golden_ar_has_no_time_embedding(golden_run, tmp_path):
    ar = ["--config.objective=ar", "--config.alpha_0=0", "--config.model.cond_width=0"]
    workdir = golden_run("weights_ar", *ar, "--config.start_token=mask")
    model, golden = restored(workdir), vectors("07_ar_mask")
    token = golden["input_tokens"]
    index = np.broadcast_to(np.arange(token.shape[1]), token.shape)
    close(model.logits(token, index, index, np.ones_like(token, bool)), golden["logits"])
    assert_same(exported(workdir, tmp_path / "out.safetensors"), vectors("weights_ar"))
    config = checkpoint_meta.saved_config(workdir)
    entry = checkpoint_meta.read_meta(workdir)["tokenizer"]
    special = build.build_model(config, entry, sharding.make_mesh(config.mesh)).special
    assert (special.mask, special.start) == (66, 66)


# What the file says of the run.


def test_hyper_parameters_become_the_config(converted):
    config = json.loads((converted / "config.json").read_text())
    assert (config["objective"], config["alpha_0"], config["kappa"]) == ("eso_b", 0.25, 0.5)
    model = {k: config["model"][k] for k in ("width", "blocks", "heads", "cond_width", "dropout")}
    assert model == dict(width=8, blocks=2, heads=2, cond_width=4, dropout=0.1)
    assert config["data"]["seq_len"] == 16 and config["data"]["tokenizer"] == "gpt2"
    assert config["optimizer"]["learning_rate"] == 2e-4 and config["optimizer"]["b2"] == 0.99
    assert config["train"]["batch_size"] == 8 and config["optimizer"]["ema_decay"] == 0.999
    meta = checkpoint_meta.read_meta(converted)
    assert meta["converted"] == {"file": "esolm.ckpt", "weights": "raw weights and EMA"}
    assert (meta["tokenizer"]["vocab_size"], meta["tokenizer"]["mask_id"]) == (257, 257)


def hyper(**algo):
    base = {**published_toy.HYPER, "algo": published_toy.HYPER["algo"] | algo}
    return {"config": base}


@pytest.mark.parametrize(
    ("algo", "want"),
    [
        (dict(name="ar", prepend_token="mask"), ("ar", 0.0, "mask", 0)),
        (dict(name="ar", prepend_token="bos"), ("ar", 0.0, "bos", 0)),
        (dict(name="ar", prepend_token="none"), ("ar", 0.0, "none", 0)),
        (dict(name="ar"), ("ar", 0.0, "none", 0)),  # of MDLM, BD3-LM and Duo
        (dict(name="mdlm"), ("mdlm", 1.0, "bos", 4)),
        (dict(name="bd3lm"), ("bd3", 1.0, "bos", 4)),
        (dict(alpha_0=0, diffusion_attn_mode="bidirectional"), ("eso_b", 0.0, "bos", 4)),
        (dict(alpha_0=1, sequential_attn_mode="mixed"), ("eso_b", 1.0, "bos", 4)),
        (
            dict(diffusion_attn_mode="mixed2", sequential_attn_mode="mixed"),
            ("eso_a", 0.25, "bos", 4),
        ),
    ],
)
def test_families(algo, want):
    config = published_config.from_hyper(hyper(**algo), "file")
    got = config.objective, config.alpha_0, config.start_token, config.model.cond_width
    assert got == want


def test_config_of_a_hub_model_beside_the_file(tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file({"a": np.zeros(1)}, path)
    said = dict(model_type="bd3lm", block_size=4, hidden_dim=64, cond_dim=32, n_blocks=2)
    said |= dict(n_heads=4, model_length=32, dropout=0.1, time_conditioning=False)
    (tmp_path / "config.json").write_text(json.dumps(said))
    config = published_config.get_config(str(path))
    assert (config.objective, config.block_length, config.data.seq_len) == ("bd3", 4, 32)
    assert (config.model.width, config.model.heads, config.data.tokenizer) == (64, 4, "gpt2")


def folder_of_hub(folder: pathlib.Path, **fields) -> pathlib.Path:
    """A folder with the published code: the toy's weights, and a config.json."""
    folder.mkdir()
    weights = {f"backbone.{name}": array for name, array in toy(0).items()}
    safetensors.numpy.save_file(weights, folder / "model.safetensors", {"format": "pt"})
    said = dict(model_length=16, cond_dim=4, n_blocks=2, n_heads=2, vocab_size=258, dropout=0.1)
    said |= {"auto_map": {"AutoModelForMaskedLM": "modeling.Model"}, "time_conditioning": False}
    (folder / "config.json").write_text(json.dumps(said | fields))
    return folder


@pytest.mark.parametrize(
    ("fields", "want"),
    [
        ({"model_type": "mdlm", "hidden_dim": 8}, ("mdlm", 1.0)),
        ({"model_type": "bd3lm", "hidden_dim": 8, "block_size": 4, "adaln": True}, ("bd3", 1.0)),
        ({"model_type": "EsoLM", "hidden_size": 8, "mask_index": 257}, ("eso_b", 1.0)),
        ({"model_type": "EsoLM", "hidden_size": 8, "alpha_0": 0.25}, ("eso_b", 0.25)),
    ],
)
def test_folder_of_the_hub_with_the_published_code(tmp_path, gpt2, capsys, fields, want):
    folder = folder_of_hub(tmp_path / "hub", **fields)
    assert convert(folder, tmp_path / "run", gpt2) == 0
    unknown = "alpha_0" not in fields and want[0] == "eso_b"
    assert ("has no alpha_0: took 1" in capsys.readouterr().out) == unknown
    config = checkpoint_meta.saved_config(tmp_path / "run")
    assert (config.objective, config.alpha_0) == want
    assert (config.model.width, config.data.seq_len) == (8, 16)
    assert_same(exported(tmp_path / "run", tmp_path / "out.safetensors"), toy(0))


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"model_type": "DUO", "hidden_dim": 8}, "algo.name='duo'"),
        ({"model_type": "mdlm", "hidden_dim": 8, "causal": True}, "algo.causal=True"),
        ({"model_type": "bd3lm", "hidden_dim": 8, "adaln": False}, "algo.adaln=False"),
        ({"model_type": "mdlm", "hidden_dim": 8, "time_conditioning": True}, "time_conditioning"),
    ],
)
def test_other_published_code_is_refused(tmp_path, gpt2, capsys, fields, told):
    folder = folder_of_hub(tmp_path / "hub", **fields)
    capsys.readouterr()
    assert convert(folder, tmp_path / "run", gpt2) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line and "an unsupported architecture" in line


# The verbs take it at once.


def test_sample_evaluate_and_train_go_on(converted, tmp_path, capsys):
    workdir = shutil.copytree(converted, tmp_path / "run")
    assert command("sample", f"--workdir={workdir}", "--config.sample.num_texts=2") == 0
    assert json.loads((workdir / "samples.json").read_text())["step"] == STEP
    text = tiny_run.arguments(tiny_run.write_text(tmp_path / "text"))
    assert command("prepare", f"--workdir={workdir}", *text) == 0
    one_phase = "--config.alpha_0=1"  # is compiled sooner
    assert command("evaluate", f"--workdir={workdir}", "--config.eval.batch_size=8", one_phase) == 0
    assert json.loads((workdir / "evaluate.json").read_text())["step"] == STEP
    capsys.readouterr()
    more = [f"--config.train.steps={STEP + 1}", "--config.train.log_every=1", one_phase]
    more += ["--config.train.batch_size=4", "--config.eval.batch_size=8"]  # only the model is given
    more += ["--config.optimizer.warmup_steps=1", "--config.model.dropout=0"]
    assert command("train", f"--workdir={workdir}", *text, *more) == 0
    assert f"at step {STEP}" in capsys.readouterr().out
    line = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[0])
    assert line["step"] == STEP + 1 and line["learning_rate"] == 0  # it warms up again
    meta = checkpoint_meta.read_meta(workdir)
    assert "converted" not in meta and meta["cursor"] == 4
    # Without an update of the weights, the EMA came nearer to them by the decay of its age.
    names = "raw", "ema"
    raw, ema = (exported(workdir, tmp_path / f"{n}.safetensors", f"--weights={n}") for n in names)
    assert_same(raw, toy(0))
    name = "output_layer.linear.weight"
    decay = min(0.999, (2 + STEP) / (11 + STEP))
    want = decay * toy(1)[name] + (1 - decay) * toy(0)[name]
    np.testing.assert_allclose(ema[name], want, atol=1e-6)


def test_another_model_is_refused_in_training(converted, tmp_path, capsys):
    workdir = shutil.copytree(converted, tmp_path / "run")
    text = tiny_run.arguments(tiny_run.write_text(tmp_path / "text"))
    assert command("prepare", f"--workdir={workdir}", *text) == 0
    args = [f"--workdir={workdir}", *text, "--config.model.heads=1", "--config.train.batch_size=4"]
    assert command("train", *args) == 2
    assert "config.model.heads=1: must be 2, as in the checkpoint" in capsys.readouterr().err


# Bad input.


def test_directions(refused, tmp_path, converted):
    work = f"--workdir={tmp_path / 'run'}"
    refused([work], "--from=FILE", "--to=FILE")
    refused([work, "--from=a", "--to=b"], "not both")
    refused([f"--from={CKPT}"], "--workdir is missing")
    refused([work, "--from=none.ckpt"], "--from=none.ckpt: no such file")
    refused([work, "--to=out.safetensors"], "no checkpoints here")
    out = [f"--workdir={converted}"]
    refused([*out, "--to=out.ckpt"], "--to=out.ckpt: must end in .safetensors")
    refused([*out, f"--to={tmp_path}/no/a.safetensors"], "must be in a folder that exists")
    (tmp_path / "a.safetensors").write_text("mine")
    refused([*out, f"--to={tmp_path}/a.safetensors"], "must be a new file")
    refused([*out, f"--to={tmp_path}/b.safetensors", "--weights=both"], "--weights=both: must be")


def test_target_that_is_not_empty(refused, tmp_path, gpt2):
    workdir = tmp_path / "run"
    (workdir / "notes").mkdir(parents=True)
    args = [f"--from={CKPT}", f"--workdir={workdir}", f"--tokenizer={gpt2}"]
    refused(args, f"--workdir={workdir}: must be new, empty or hold only data/, but holds notes")


def test_no_hyper_parameters_and_no_config(refused, tmp_path, gpt2):
    path = tmp_path / "bare.safetensors"
    safetensors.numpy.save_file(toy(0), path)
    args = [f"--from={path}", f"--workdir={tmp_path / 'run'}", f"--tokenizer={gpt2}"]
    refused(args, "--config is missing: the number of heads cannot be inferred")
    sizes = ["--config.model.heads=2", "--config.model.width=16", "--config.model.blocks=2"]
    given = [*args, f"--config={tiny_run.FILE}", *sizes]
    refused(given, "config.model.width=16: must be 8, as in the tensors of")
    refused([*given, "--config.model.style=llama"], "config.model.style='llama'")
    refused([*given, "--weights=half"], "--weights=half: must be one of both, ema, raw")


def test_what_no_shape_tells_is_taken_from_the_file(refused, tmp_path, gpt2):
    args = [f"--from={CKPT}", f"--workdir={tmp_path / 'run'}", f"--tokenizer={gpt2}"]
    refused([*args, "--config.model.heads=1"], "config.model.heads=1: must be 2, as in")
    refused([*args, "--config.alpha_0=0.5"], "config.alpha_0=0.5: must be 0.25, as in")
    other = [f"--config={tiny_run.FILE}", "--config.objective=mdlm", "--config.alpha_0=1"]
    refused([*args, *other], "config.objective='mdlm': must be 'eso_b', as in")


def test_tokenizer_of_another_run(refused, tmp_path, converted):
    work = [f"--workdir={tmp_path / 'run'}"]
    refused([*work, f"--from={CKPT}"], "--tokenizer is missing")
    refused(
        [*work, f"--from={CKPT}", "--tokenizer=bytes"], "has 258 ids", "bytes tokenizer has 260"
    )
    refused([*work, f"--from={CKPT}", f"--tokenizer={tmp_path}"], "holds no tokenizer")
    out = tmp_path / "a.safetensors"
    exported(converted, out)
    swapped = shutil.copytree(converted / "tokenizer", tmp_path / "swapped")
    content = json.loads((swapped / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    vocab["!"], vocab['"'] = vocab['"'], vocab["!"]
    (swapped / "tokenizer.json").write_text(json.dumps(content))
    refused(
        [*work, f"--from={out}", f"--tokenizer={swapped}"],
        "needs the tokenizer that it was trained on",
    )


def test_tensors_that_do_not_fit_are_listed_with_the_nearest(refused, tmp_path, gpt2):
    tensors = toy(0)
    for i in range(2):
        tensors[f"blocks.{i}.attn_qkv2.weight"] = tensors.pop(f"blocks.{i}.attn_qkv.weight")
    tensors["mixer.A_log"] = np.zeros(3, np.float32)
    del tensors["output_layer.norm_final.weight"]
    tensors["output_layer.linear.bias"] = np.zeros(5, np.float32)
    path = tmp_path / "odd.safetensors"
    safetensors.numpy.save_file(tensors, path)
    model = ["heads=2", "width=8", "blocks=2", "cond_width=4"]
    args = [f"--from={path}", f"--workdir={tmp_path / 'run'}", f"--tokenizer={gpt2}"]
    refused(
        [*args, f"--config={tiny_run.FILE}", *(f"--config.model.{field}" for field in model)],
        "missing tensors: blocks.*.attn_qkv.weight (in 2 blocks) (here is blocks.0.attn_qkv2.w",
        "output_layer.norm_final.weight",
        "belong to no part of this model: blocks.*.attn_qkv2.weight (in 2 blocks) (the model has",
        "mixer.A_log",
        "output_layer.linear.bias: shape (5,) here, (258,) in the model",
    )


@pytest.mark.parametrize(
    ("algo", "told"),
    [
        (dict(backbone="dimamba"), "algo.backbone='dimamba' (allowed: dit"),
        (dict(name="duo"), "algo.name='duo'"),
        (dict(time_conditioning=True), "algo.time_conditioning=True"),
        (dict(sequential_attn_mode="mixed"), "algo.sequential_attn_mode='mixed'"),
        (dict(diffusion_attn_mode="bidirectional"), "diffusion_attn_mode='bidirectional'"),
    ],
)
def test_architectures_that_are_not_here(algo, told):
    with pytest.raises(UserError, match="an unsupported architecture") as error:
        published_config.from_hyper(hyper(**algo), "file")
    assert told in str(error.value)


def test_damaged_safetensors(refused, tmp_path):
    path = tmp_path / "a.safetensors"
    safetensors.numpy.save_file(toy(0), path)
    whole = path.read_bytes()
    for content in (b"", whole[:4], whole[:-1], b"\xff" * 100):
        path.write_bytes(content)
        args = [f"--from={path}", f"--workdir={tmp_path / 'run'}", "--tokenizer=bytes"]
        refused(args, f"{path}: truncated, or not a safetensors file")


def test_other_files(refused, tmp_path):
    work = [f"--workdir={tmp_path / 'run'}", "--tokenizer=bytes"]
    for content, told in (
        (b"text", "must be a file of torch.save"),
        (b"\x80\x02}.", "bare pickle"),
    ):
        path = tmp_path / "a.ckpt"
        path.write_bytes(content)
        refused([*work, f"--from={path}"], told)


def test_ema_that_does_not_fit():
    raw = toy(0)
    shadow = list(raw.values())
    assert list(published_file.Published(CKPT, raw, shadow).ema()) == list(raw)
    for broken in (shadow[:-1], [*shadow[1:], shadow[0]], {}):
        with pytest.raises(UserError, match="the EMA .*--weights=raw"):
            published_file.Published(CKPT, raw, broken).ema()


def test_a_hostile_checkpoint_runs_nothing(refused, tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)

    path = tmp_path / "a.ckpt"
    with zipfile.ZipFile(path, "w") as zipped:
        zipped.writestr("a/data.pkl", pickle.dumps({"state_dict": {"a": Hostile()}}, 2))
    args = [f"--from={path}", f"--workdir={tmp_path / 'run'}", "--tokenizer=bytes"]
    told = "'a' is posix.system: must be a tensor (nothing was executed)"
    refused(args, told)
    refused([*args, f"--config={tiny_run.FILE}"], told)


def test_prefixes_and_what_is_no_weight():
    zeros = np.zeros(1)
    names = {"module.backbone._orig_mod.a": 1, "backbone.backbone.b": 1, "c.backbone.d": 1}
    other = {"backbone.rotary_emb.inv_freq": 1, "sampling_eps_min": 1, "noise.sigma": 1}
    found = published_file._backbone(pathlib.Path("f"), dict.fromkeys(names | other, zeros))
    assert list(found) == ["a", "b", "c.backbone.d"]
