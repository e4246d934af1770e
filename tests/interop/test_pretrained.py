"""GPT-2, Llama and Qwen → a workdir: their logits; what does not fit is told; and back again."""

import json
import pathlib
import shutil
import tracemalloc

import jax
import numpy as np
import pytest
import safetensors.numpy
import tiny_run
from tiny_run import command

from configs import pretrained
from esolm_jax import config
from esolm_jax.data import hub_tokenizer
from esolm_jax.errors import UserError
from esolm_jax.family import ar
from esolm_jax.family.labels import Tokens
from esolm_jax.family.phase import SpecialIds, make_phases
from esolm_jax.interop.hub import config as hub_config
from esolm_jax.interop.hub import names as hub_names
from esolm_jax.model import build
from esolm_jax.parallel import sharding
from esolm_jax.training import checkpoint_meta, restore

HUB = pathlib.Path(__file__).parents[1] / "fixtures" / "hf"
FAMILIES = ("gpt2", "llama", "llama3", "qwen2", "qwen3")  # see data/make_hf.py
TIED = ("gpt2", "llama3", "qwen2")
ONE = "--config.mesh.devices=1"
IDS = 64


def convert(source, workdir, *args):
    return command("convert", f"--from={source}", f"--workdir={workdir}", *args, ONE)


def load(workdir):
    saved = checkpoint_meta.saved_config(workdir)
    return restore.load_trained(saved, workdir, "ema", sharding.make_mesh(saved.mesh))


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """Workdir by family."""
    base = tmp_path_factory.mktemp("converted")
    for family in FAMILIES:
        assert convert(HUB / family, base / family) == 0
    return {family: base / family for family in FAMILIES}


def expected(family):
    found = np.load(HUB / family / "expected.npz")
    return found["tokens"].astype(np.int32), found["logits"]


def tensors_of(folder):
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= safetensors.numpy.load_file(file)
    return found


# The model.


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(converted, family):
    trained = load(converted[family])
    token, wanted = expected(family)
    index = np.broadcast_to(np.arange(token.shape[1], dtype=np.int32), token.shape)
    tokens = Tokens(token, index, index, np.ones(token.shape, bool))
    logits = np.asarray(jax.jit(trained.built.apply)(trained.params, tokens))
    np.testing.assert_allclose(logits[..., :IDS], wanted, rtol=0, atol=2e-5)
    assert np.all(logits[..., IDS] == 0)  # the mask's


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_our_objective_of_it_is_its_own(converted, family):
    """Labels of "ar": the text behind BOS, each token from those before it."""
    trained = load(converted[family])
    token, wanted = expected(family)
    text = token[:, 1:]
    special = trained.built.special
    assert (special.start, special.mask) == (token[0, 0], IDS)
    labelled = ar.label(text, np.ones(text.shape, bool), start=special.start)
    logits = np.asarray(jax.jit(trained.built.apply)(trained.params, labelled.tokens))
    np.testing.assert_allclose(logits[..., :IDS], wanted[:, :-1], rtol=0, atol=2e-5)
    np.testing.assert_array_equal(labelled.target, text)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_is_that_of_transformers(converted, family):
    """`sample` behind a prompt, which goes through the tokenizer that was carried over."""
    workdir, wanted = converted[family], np.load(HUB / family / "expected.npz")["greedy"]
    args = "--config.sample.temperature=0", "--config.sample.num_texts=1"
    length = f"--config.sample.length={len(wanted)}"
    prompt = "--prompt=he said, the"
    assert command("sample", f"--workdir={workdir}", prompt, length, "--trace", *args, ONE) == 0
    (line,) = (workdir / "samples.jsonl").read_text().splitlines()
    found = json.loads(line)
    assert found["token_ids"] == wanted.tolist()
    assert found["text"].startswith("he said, the")
    steps = (workdir / "trace.html").read_text()
    assert '"he"' in steps  # one token


def test_texts_longer_than_the_learned_positions_are_refused(converted, capsys):
    args = f"--workdir={converted['gpt2']}", "--config.sample.length=33", ONE
    assert command("sample", *args) == 2
    assert (
        "config.sample.length=33: must be at most model.max_positions=32" in capsys.readouterr().err
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_mask_is_the_mean_and_tied_embeddings_are_untied(converted, family):
    params = load(converted[family]).params
    embedding = np.asarray(params["embedding"]["embedding"])
    head = np.asarray(params["logits"]["kernel"])
    assert embedding.shape == (IDS + 1, 16) and head.shape == (16, IDS + 1)
    np.testing.assert_allclose(embedding[IDS], embedding[:IDS].mean(axis=0), atol=1e-6)
    assert np.array_equal(embedding[:IDS], head.T[:IDS]) == (family in TIED)


def test_config_is_that_of_the_folder(converted):
    model = {family: checkpoint_meta.saved_config(converted[family]).model for family in FAMILIES}
    assert (model["gpt2"].style, model["gpt2"].max_positions, model["gpt2"].qkv_bias) == (
        "gpt2", 32, True,
    )  # fmt: skip
    assert (model["llama"].norm_eps, model["llama"].kv_heads) == (1e-6, 2)
    rope = (
        model["llama3"].rope_base,
        model["llama3"].rope_factor,
        model["llama3"].rope_original_length,
    )
    assert rope == (500.0, 4.0, 16)
    assert (model["qwen2"].qkv_bias, model["qwen2"].qk_norm) == (True, False)
    assert (model["qwen3"].qk_norm, model["qwen3"].attention_width) == (True, 32)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_read(tmp_path, dtype):
    import ml_dtypes

    folder = copy("qwen3", tmp_path)
    numbers = np.float16 if dtype == "float16" else ml_dtypes.bfloat16
    low = {name: array.astype(numbers) for name, array in tensors_of(folder).items()}
    safetensors.numpy.save_file(low, folder / "model.safetensors", {"format": "pt"})
    assert convert(folder, tmp_path / "run") == 0
    norm = load(tmp_path / "run").params["final_norm"]["scale"]
    np.testing.assert_array_equal(norm, low["model.norm.weight"].astype(np.float32))


def test_older_files_of_gpt2_are_read(converted, tmp_path):
    """Names without the prefix, constants stored beside the parameters, the tied head too."""
    folder = copy("gpt2", tmp_path)
    tensors = {n.removeprefix("transformer."): a for n, a in tensors_of(folder).items()}
    for i in range(2):
        tensors[f"h.{i}.attn.bias"] = np.ones((1, 1, 32, 32), np.uint8)
        tensors[f"h.{i}.attn.masked_bias"] = np.float32([-1e4])
    tensors["lm_head.weight"] = tensors["wte.weight"]
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    assert convert(folder, tmp_path / "run") == 0
    found, wanted = load(tmp_path / "run").params, load(converted["gpt2"]).params
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_large_model_is_never_in_memory(tmp_path):
    """Of 77 MB no more than the largest tensors; what Orbax copies would be seen, too."""
    folder = copy("llama", tmp_path)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 20}
    settings = json.loads((folder / "config.json").read_text()) | sizes | {"head_dim": 64}
    (folder / "config.json").write_text(json.dumps(settings))
    config = hub_config.get_config(str(folder))
    model = build.model_config(config, {"vocab_size": IDS, "mask_id": IDS}, "cpu")
    parts = hub_names.hub_tensors(model, IDS, tied=False, prefix="model.")
    tensors = {part.name: np.ones(part.shape, np.float16) for part in parts}
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    size = 4 * sum(tensor.size for tensor in tensors.values())
    del tensors
    tracemalloc.start()
    assert convert(folder, tmp_path / "run") == 0
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size > 70e6 and peak < size / 4


# Bad input.


def copy(family, tmp_path):
    return pathlib.Path(shutil.copytree(HUB / family, tmp_path / "hub"))


def cut(file, size):
    file.write_bytes(file.read_bytes()[:size])


def write_tensor(file, lies):
    """A safetensors file of one tensor, whose header lies."""
    tensor = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | lies
    header = json.dumps({"transformer.wte.weight": tensor}).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))


@pytest.fixture
def refused(capsys, tmp_path):
    """refused(folder, *parts): one line with the parts, and nothing is written."""

    def check(folder, *parts, args=(), workdir=None):
        workdir = workdir or tmp_path / "run"
        before = sorted(tmp_path.rglob("*"))
        capsys.readouterr()
        assert convert(folder, workdir, *args) == 2
        (line,) = capsys.readouterr().err.splitlines()
        for part in parts:
            assert part in line
        assert sorted(tmp_path.rglob("*")) == before

    return check


def test_tensors_that_do_not_fit_are_listed(refused, tmp_path):
    folder = copy("qwen2", tmp_path)
    tensors = tensors_of(folder)
    for i in range(2):
        name = f"model.layers.{i}.self_attn.q_proj.weight"
        tensors[name.replace("q_proj", "q_prj")] = tensors.pop(name)
    tensors["model.norm.weight"] = np.ones(8, np.float32)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    refused(
        folder,
        "missing tensors: model.layers.*.self_attn.q_proj.weight (in 2 blocks) "
        "(here is model.layers.0.self_attn.q_prj.weight), model.layers.1.mlp.up_proj.weight",
        "tensors that belong to no part of this model: model.layers.*.self_attn.q_prj.weight",
        "model.norm.weight: shape (8,) here, (16,) in the model",
    )


@pytest.mark.parametrize(
    ("family", "change", "parts"),
    [
        ("llama", {"model_type": "mamba"}, ["model_type='mamba'", "gpt2, llama, qwen2, qwen3"]),
        ("llama", {"attention_bias": True}, ["missing tensors", "self_attn.q_proj.bias"]),
        ("qwen2", {"use_sliding_window": True}, ["use_sliding_window=True"]),
        ("gpt2", {"activation_function": "relu"}, ["activation_function='relu'", "gelu_new"]),
        (
            "llama",
            {"hidden_act": "gelu", "mlp_bias": 3},
            ["hidden_act='gelu' (allowed: silu, swish); mlp_bias=3 (allowed: False, True)"],
        ),
        (
            "llama",
            {"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 4.0}},
            ["rope scaling", "'dynamic'", "allowed: default, linear, llama3, yarn"],
        ),
        ("qwen3", {"layer_types": ["sliding_attention"] * 2}, ["layer_types"]),
        ("llama", {"quantization_config": {"bits": 4}}, ["quantization_config"]),
        ("llama", {"hidden_size": None}, ["hidden_size is missing"]),
        ("llama", {"hidden_size": "16"}, ["hidden_size='16': must be a positive int"]),
        ("llama", {"eos_token_id": None}, ["eos_token_id is missing"]),
        ("llama", {"vocab_size": 50}, ["has id 59, but the model has only 50 ids"]),
        ("llama", {"vocab_size": 65}, ["model.embed_tokens.weight: shape (64, 16) here, (65, 16)"]),
    ],
)
def test_config_json_that_is_not_ours_is_told(refused, tmp_path, family, change, parts):
    folder = copy(family, tmp_path)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    refused(folder, *parts)


@pytest.mark.parametrize(
    ("family", "spoil", "parts"),
    [
        ("llama", lambda f: (f / "config.json").unlink(), ["a folder without config.json"]),
        ("llama", lambda f: (f / "config.json").write_text("{"), ["config.json: not JSON"]),
        ("gpt2", lambda f: (f / "tokenizer.json").unlink(), ["holds no tokenizer"]),
        ("gpt2", lambda f: (f / "tokenizer.json").write_text("{}"), ["tokenizer.json: damaged"]),
        (
            "llama",
            lambda f: (f / "model-00002-of-00003.safetensors").unlink(),
            ["shards are missing: model-00002-of-00003.safetensors"],
        ),
        (
            "gpt2",
            lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
            ["neither model.safetensors nor", "pytorch_model.bin is not read"],
        ),
        (
            "gpt2",
            lambda f: (f / "model.safetensors").write_bytes(b"short"),
            ["truncated, or not a safetensors file"],
        ),
        ("gpt2", lambda f: cut(f / "model.safetensors", -100), ["truncated, or not a safetensors"]),
        ("llama", lambda f: cut(f / "model-00003-of-00003.safetensors", 7), ["00003", "truncated"]),
        (
            "gpt2",
            lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 7 + b"\x7f{}"),
            ["truncated, or not a safetensors file"],
        ),
        (
            "gpt2",
            lambda f: write_tensor(f / "model.safetensors", {"data_offsets": [0, 2**40]}),
            ["truncated, or not a safetensors file"],
        ),
        (
            "gpt2",
            lambda f: write_tensor(f / "model.safetensors", {"shape": [2**62, 2**62]}),
            ["truncated, or not a safetensors file"],
        ),
        (
            "llama",
            lambda f: (f / "model.safetensors.index.json").write_text(
                json.dumps({"weight_map": {"model.norm.weight": "../secret.safetensors"}})
            ),
            ["refused: it names the file '../secret.safetensors'"],
        ),
    ],
)
def test_folder_that_is_damaged_is_told(refused, tmp_path, family, spoil, parts):
    folder = copy(family, tmp_path)
    spoil(folder)
    refused(folder, *parts)


def test_other_misfits_are_told(refused, converted, tmp_path):
    llama = HUB / "llama"
    refused(llama, "config.model.blocks=3: must be 2, as in", args=["--config.model.blocks=3"])
    refused(llama, "config.objective='eso_b'", args=["--config.objective=eso_b"])
    refused(
        llama, "--weights=ema: must be left out, because a folder has one", args=["--weights=ema"]
    )
    refused(
        llama,
        "config.model.max_positions=16: must be 0 (RoPE) or at least",
        args=["--config.model.max_positions=16"],
    )
    refused(llama, "the bytes tokenizer has 259 ids", args=["--tokenizer=bytes"])
    refused(llama, "but holds checkpoints", workdir=converted["llama"])


# And back.


@pytest.mark.parametrize("family", ["llama", "llama3", "qwen2", "qwen3"])
def test_what_goes_out_is_what_came_in(converted, tmp_path, family):
    out = tmp_path / "out"
    assert command("convert", f"--workdir={converted[family]}", f"--to={out}/", ONE) == 0
    found, wanted = tensors_of(out), tensors_of(HUB / family)
    assert ("lm_head.weight" in found) != (family in TIED)
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    theirs = json.loads((HUB / family / "config.json").read_text())
    ours = json.loads((out / "config.json").read_text())
    assert ours == theirs
    assert (out / "tokenizer.json").read_bytes() == (HUB / family / "tokenizer.json").read_bytes()
    assert convert(out, tmp_path / "again") == 0
    jax.tree.map(
        np.testing.assert_array_equal,
        load(tmp_path / "again").params,
        load(converted[family]).params,
    )


def test_what_cannot_go_out_is_told(converted, tmp_path, capsys):
    def told(workdir, target, part):
        capsys.readouterr()
        assert command("convert", f"--workdir={workdir}", f"--to={target}", ONE) == 2
        assert part in capsys.readouterr().err

    told(converted["gpt2"], f"{tmp_path}/out/", "config.model.style='gpt2': must be 'llama'")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    told(converted["llama"], tmp_path / "full", "must be a new or empty folder")
    told(converted["llama"], f"{tmp_path}/no/where/", "must be in a folder that exists")


# The tokenizer.


def test_tokenizer_is_carried_over(converted, tmp_path):
    tokenizer = hub_tokenizer.read(converted["gpt2"] / "tokenizer")
    assert (tokenizer.vocab_size, tokenizer.mask_id, tokenizer.eos_id) == (IDS, IDS, 59)
    text = "he said, the end."
    ids = tokenizer.encode(text)
    assert ids[0] == 58 and tokenizer.decode(ids) == text  # "he" is one token
    assert 59 not in tokenizer.encode("<|endoftext|>")  # in text it is but letters
    assert tokenizer.decode([*ids, 59, IDS, 63]) == text + "[EOS][MASK]"  # 63: no token
    with pytest.raises(ValueError):
        tokenizer.decode([IDS + 1])
    tokenizer.save(tmp_path)
    assert hub_tokenizer.read(tmp_path).fingerprint == tokenizer.fingerprint
    other = hub_tokenizer.HubTokenizer(tokenizer.content, tokenizer.ids | {"vocab_size": 70})
    assert other.fingerprint != tokenizer.fingerprint
    with pytest.raises(UserError, match="the bos token has id 64; must be below 64"):
        hub_tokenizer.HubTokenizer(tokenizer.content, tokenizer.ids | {"bos": IDS})


# To an Eso-LM.


@pytest.fixture(scope="module")
def prepared(converted, tmp_path_factory):
    """Settings of a run that starts from the llama, whose data lie prepared."""
    base = tmp_path_factory.mktemp("prepared")
    settings = pretrained.get_config(str(converted["llama"]))
    with settings.unlocked():
        settings.update_from_flattened_dict(tiny_run.write_text(base))
        settings.data.dir = str(base / "data")
        settings.data.seq_len = 16
        settings.model.dtype = "float32"
        settings.mesh.devices = 1
        settings.train.batch_size = 16
    config.validate(settings)
    from esolm_jax import prepare

    prepare.main(settings, base)
    return settings


def test_run_starts_with_the_weights(converted, prepared):
    from esolm_jax.train import Run

    state = tiny_run.fresh_state(Run(prepared, pathlib.Path("unused")))
    wanted = load(converted["llama"]).params
    for tree in (state.params, state.ema):
        jax.tree.map(np.testing.assert_array_equal, tree, wanted)
    assert int(state.step) == 0


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("model.norm_eps", 1e-5, "config.model.norm_eps=1e-05: must be"),
        ("model.qk_norm", True, "config.model.qk_norm=True"),
        ("init_from", "nowhere", "config.init_from='nowhere'"),
    ],
)
def test_run_cannot_start_with_other_weights(prepared, field, value, told):
    from esolm_jax.train import Run

    settings = prepared.copy_and_resolve_references()
    with settings.unlocked():
        settings.update_from_flattened_dict({field: value})
    with pytest.raises(UserError) as error:
        tiny_run.fresh_state(Run(settings, pathlib.Path("unused")))
    assert told in str(error.value)


def test_pretrained_workdir_is_not_trained_in(converted, prepared, capsys):
    settings = checkpoint_meta.saved_config(converted["llama"])
    with settings.unlocked():
        settings.data.update(prepared.data)
        settings.mesh.devices = 1
        settings.train.batch_size = 16
    with pytest.raises(UserError, match="--config.init_from="):
        tiny_run.train(settings, converted["llama"])


def test_alpha_0_rises_from_0_and_then_stays(prepared):
    settings = prepared.copy_and_resolve_references()
    with settings.unlocked():
        settings.train.anneal_steps = 2
    _, metrics = tiny_run.steps(settings, 4)
    assert [m["alpha_0"] for m in metrics] == [0, 0.25, 0.5, 0.5]
    assert metrics[0]["loss_diffusion"] == 0 and metrics[1]["loss_diffusion"] > 0


def test_annealed_labels_are_those_of_a_config_with_that_alpha_0(prepared):
    """Also at 0: what is masked, weighted and predicted."""
    special = SpecialIds(mask=IDS, start=59)
    x = np.random.default_rng(0).integers(0, IDS, (4, 16)).astype(np.int32)
    valid = np.ones(x.shape, bool)
    for alpha_0 in (0.125, 0.5):
        plain = prepared.copy_and_resolve_references()
        with plain.unlocked():
            plain.alpha_0 = alpha_0
        wanted = make_phases(plain, special, low_variance=False)
        label = lambda a, i, key: make_phases(  # noqa: E731
            prepared, special, low_variance=False, alpha_0=a
        )[i].label(key, x, valid)
        for i, phase in enumerate(wanted):
            found = jax.jit(label, static_argnums=1)(np.float32(alpha_0), i, jax.random.key(i))
            want = phase.label(jax.random.key(i), x, valid)
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, want)
    first = label(np.float32(0), 0, jax.random.key(0))
    assert not np.any(first.weight)
    second = label(np.float32(0), 1, jax.random.key(0))
    np.testing.assert_array_equal(second.weight, 1)
    np.testing.assert_array_equal(second.target, x)  # all of it, left to right


@pytest.mark.parametrize(("objective", "alpha_0"), [("eso_b", 1.0), ("eso_b", 0.0), ("bd3", 1.0)])
def test_annealing_needs_both_phases(objective, alpha_0):
    settings = config.default_config()
    settings.objective, settings.alpha_0 = objective, alpha_0
    settings.train.anneal_steps = 5
    with pytest.raises(UserError, match="config.train.anneal_steps=5: must be 0 unless"):
        config.validate_training(settings, {"diffusion": 1.0}, 1)


def test_recipe_needs_a_workdir(converted):
    with pytest.raises(UserError, match="pretrained.py:WORKDIR"):
        pretrained.get_config()
    settings = pretrained.get_config(str(converted["qwen3"]))
    config.validate(settings)
    assert settings.is_locked
    assert config.flat(settings).keys() == config.flat(config.default_config()).keys()
