"""`export --to=hub`: what is written is read back bit for bit, and `transformers` computes it.

PyTorch runs the written code only where torch and transformers are installed (.[hub]).
"""

import ast
import importlib.util
import json
import pathlib
import random
import re
import shutil
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
from random_run import ADALN, LENGTH, PRETRAINED, make_run
from tiny_run import command, refused_by

import esolm_jax
from esolm_jax.data import wordpieces
from esolm_jax.data.text8_tokenizer import Text8
from esolm_jax.data.tokenizer import Bytes, train_sentencepiece
from esolm_jax.errors import UserError
from esolm_jax.family.labels import Tokens
from esolm_jax.interop.export import hub_folder, rounding
from esolm_jax.interop.hub import in_memory, shards, tokenizer_files
from esolm_jax.interop.published import write as published_write
from esolm_jax.model import transformer as model_lib
from esolm_jax.sampling.plan import schedule
from esolm_jax.sampling.plan.canvas import Canvas, Seed
from esolm_jax.training import checkpoint_meta

pytestmark = pytest.mark.fast_compile
HF = pathlib.Path(__file__).parents[1] / "fixtures" / "hf"
GOLDEN = HF.parent / "golden_eval"
SHIPPED = pathlib.Path(hub_folder.__file__).parent / "shipped"
FAMILIES = {
    "eso_b": {"objective": "eso_b", "alpha_0": 0.5, "sample.seed": 3} | ADALN,
    "gpt2": {"objective": "ar"} | PRETRAINED["gpt2"],
    "eso_llama": {"objective": "eso_b", "alpha_0": 0.0}
    | PRETRAINED["llama3"]
    | {f"model.{name}": True for name in ("qkv_bias", "out_bias", "mlp_bias")}
    | {"model.rope_scaling": "yarn", "model.rope_high": 32.0, "model.rope_attention_factor": 1.2},
}
ONE = "--config.mesh.devices=1"
EOT = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
EOT |= {"content": "<|eot_id|>", "special": True}
refused = refused_by("export")


def load_file(name: str, path: pathlib.Path):
    """The module in a file, under this name."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


def trained(workdir: pathlib.Path):
    """The config and the weights that `export` takes by default."""
    config = checkpoint_meta.saved_config(workdir)
    return config, published_write.load(config, workdir, "ema")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    base = tmp_path_factory.mktemp("runs")
    return {name: make_run(base / name, **fields) for name, fields in FAMILIES.items()}


@pytest.fixture(scope="module")
def exported(runs):
    """Folders by family, the first in shards of 20 kB, the second after an evaluation."""
    found = {"step": 7, "weights": "ema", "windows": 3, "data": {"split": "test"}}
    found["results"] = [{"summary": "perplexity 5.5"}]
    (runs["gpt2"] / "evaluate.json").write_text(json.dumps(found))
    for name, workdir in runs.items():
        shard = "--shard_gb=2e-5" if name == "eso_b" else "--shard_gb=5"
        assert command("export", f"--workdir={workdir}", "--to=hub", shard) == 0
    return {name: workdir / "hub" for name, workdir in runs.items()}


# Files.


@pytest.mark.parametrize("family", FAMILIES)
def test_folder_is_read_back_bit_for_bit(runs, exported, tmp_path, family):
    source, back = exported[family], tmp_path / "back"
    assert command("convert", f"--from={source}", f"--workdir={back}", ONE) == 0
    config, before = trained(runs[family])
    config_back, after = trained(back)
    jax.tree.map(np.testing.assert_array_equal, after.params, before.params)
    assert config_back.model == config.model
    assert config_back.alpha_0 == config.alpha_0
    assert after.meta["tokenizer"] == before.meta["tokenizer"]


def test_weights_are_in_shards_of_the_requested_size(exported):
    folder = exported["eso_b"]
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2 and not (folder / "model.safetensors").exists()
    held = {name: safetensors.numpy.load_file(folder / name) for name in files}
    assert {n: file for file, tensors in held.items() for n in tensors} == index["weight_map"]
    sizes = [sum(t.nbytes for t in tensors.values()) for tensors in held.values()]
    assert sum(sizes) == index["metadata"]["total_size"]
    assert all(
        size <= 20_000 or len(tensors) == 1
        for size, tensors in zip(sizes, held.values(), strict=True)
    )


@pytest.mark.parametrize(
    ("family", "dtype", "layout"),
    [("eso_b", "bfloat16", "esolm"), ("eso_llama", "float16", "plain")],
)
def test_rounded_weights_are_read_back(runs, tmp_path, capsys, family, dtype, layout):
    """Each weight is the nearest of its type; the change is printed and on the card."""
    target = tmp_path / "hub"
    args = f"--workdir={runs[family]}", f"--to=hub:{target}", f"--layout={layout}"
    sample = "--config.sample.top_p=0.5", "--config.sample.cache_dtype=int8"  # not of the figures
    assert command("export", *args, f"--dtype={dtype}", *sample) == 0
    out = capsys.readouterr().out
    change = re.search(rf"rounded to {dtype}: logits within \S+ of .*, perplexity (\S+) %", out)
    assert 0 < abs(float(change[1])) < 5
    assert "Rounded weights: logits within" in (target / "README.md").read_text()
    assert json.loads((target / "config.json").read_text())["dtype"] == dtype
    with safetensors.safe_open(target / "model.safetensors", "np") as file:
        kinds = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    assert kinds == {{"bfloat16": "BF16", "float16": "F16"}[dtype]}
    assert command("convert", f"--from={target}", f"--workdir={tmp_path / 'back'}", ONE) == 0
    (_, before), (_, after) = trained(runs[family]), trained(tmp_path / "back")

    def check(near, exact):
        wanted = np.asarray(exact).astype(np.dtype(dtype)).astype(np.float32)
        near = np.asarray(near)[tuple(map(slice, wanted.shape))]  # without a new mask token
        np.testing.assert_array_equal(near, wanted)
        assert not np.array_equal(near, exact)

    jax.tree.map(check, after.params, before.params)


def test_types_that_a_hub_folder_lacks(refused, runs, tmp_path):
    args = f"--workdir={runs['eso_b']}", f"--to=hub:{tmp_path / 'hub'}"
    refused([*args, "--dtype=int8"], "--dtype=int8: must be one of float32, bfloat16, float16")
    huge = {"embedding": {"embedding": np.full((3, 2), 1e5, np.float32)}}
    told = "--dtype=float16: must hold all weights, but one of embedding/embedding is 1e"
    with pytest.raises(UserError, match=told):
        rounding.round_in_place(huge, "float16")


def test_config_names_sizes_ids_and_code(exported):
    made = json.loads((exported["eso_b"] / "config.json").read_text())
    for name, target in made["auto_map"].items():
        module, wanted = target.split(".")
        tree = ast.parse((exported["eso_b"] / f"{module}.py").read_text())
        assert wanted in {node.name for node in tree.body if isinstance(node, ast.ClassDef)}, name
    assert (made["hidden_size"], made["num_hidden_layers"], made["vocab_size"]) == (16, 2, 260)
    assert (made["mask_token_id"], made["eos_token_id"]) == (259, Bytes.eos_id)
    assert made["sampling"]["length"] == LENGTH and made["sampling"]["alpha_0"] == 0.5
    card = (exported["eso_b"] / "README.md").read_text()
    assert "alpha_0 = 0.5" in card and "trust_remote_code=True" in card
    assert "No evaluation of this step" in card
    card = (exported["gpt2"] / "README.md").read_text()
    assert "On 3 windows of the test split, ema weights" in card and "perplexity 5.5" in card


def test_code_needs_torch_transformers_and_numpy_only(exported):
    allowed = {"torch", "transformers", "numpy", *sys.stdlib_module_names}
    for path in exported["eso_b"].glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed
            elif isinstance(node, ast.ImportFrom) and not node.level:
                assert node.module.split(".")[0] in allowed
            elif isinstance(node, ast.ImportFrom):
                assert (exported["eso_b"] / f"{node.module}.py").is_file()


def test_shards_are_split_in_order_and_a_large_tensor_is_alone():
    shapes = {"a": (3,), "b": (2,), "c": (9,), "d": (1,)}
    assert shards.split(shapes, 4, 20) == [["a", "b"], ["c"], ["d"]]
    assert shards.split({}, 4, 20) == [[]]


def test_half_precision_is_kept_only_if_it_is_exact():
    exact = {"a": np.float32([1.5, -(2**-10)])}
    lost = exact | {"b": np.float32([1 + 2**-12])}
    shapes = {name: array.shape for name, array in lost.items()}
    assert shards.exact_dtype("bfloat16", {"a": (2,)}, exact.get) == "bfloat16"
    assert shards.exact_dtype("bfloat16", shapes, lost.get) == "float32"
    assert shards.exact_dtype("float16", {"a": (1,)}, {"a": np.float32([1e6])}.get) == "float32"
    assert shards.exact_dtype("float64", {"a": (2,)}, exact.get) == "float32"


# Bad input.


@pytest.mark.parametrize(
    ("family", "args", "part"),
    [
        ("eso_b", ["--to=hub"], "must be a new or empty folder, but holds"),
        ("eso_b", ["--to=hub:{new}", "--layout=vllm"], "--layout=vllm: must be one of auto, esolm"),
        ("eso_b", ["--to=hub:{new}", "--shard_gb=0"], "--shard_gb=0.0: must be above 0"),
        ("eso_b", ["--to=hub:{new}", "--formats=onnx"], "--formats=onnx: must be left out"),
        ("eso_b", ["--to=hub:{new}", "--layout=plain"], "config.alpha_0=0.5: must be 0.0"),
        (
            "gpt2",
            ["--to=hub:{new}", "--layout=plain"],
            "config.model.style='gpt2': must be 'llama'",
        ),
    ],
)
def test_bad_requests_are_told(runs, exported, tmp_path, capsys, family, args, part):
    args = [arg.format(new=tmp_path / "new") for arg in args]
    capsys.readouterr()
    assert command("export", f"--workdir={runs[family]}", *args) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert part in line
    assert not (tmp_path / "new").exists()


def rewrite(path: pathlib.Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("spoil", "part"),
    [
        (lambda f: next(f.glob("model-00002*")).unlink(), "shards are missing: model-00002"),
        (lambda f: shutil.rmtree(f / "tokenizer"), ""),  # bytes need no file
        (lambda f: rewrite(f / "config.json", lambda c: c.pop("esolm")), "its section esolm must"),
        (
            lambda f: rewrite(
                f / "config.json", lambda c: c["esolm"]["tokenizer"].update(fingerprint="0" * 64)
            ),
            "must be the tokenizer that the model was trained on",
        ),
        (
            lambda f: rewrite(
                f / "config.json", lambda c: c["esolm"]["config"]["model"].update(blocks=3)
            ),
            "missing tensors: blocks.2.",
        ),
    ],
)
def test_damaged_folders_are_told(exported, tmp_path, capsys, spoil, part):
    folder = pathlib.Path(shutil.copytree(exported["eso_b"], tmp_path / "hub"))
    spoil(folder)
    capsys.readouterr()
    code = command("convert", f"--from={folder}", f"--workdir={tmp_path / 'back'}", ONE)
    assert code == (2 if part else 0)
    assert part in capsys.readouterr().err


# A plain Llama.


def test_plain_folder_at_alpha_0_of_0_predicts_at_a_mask_behind_the_text(tmp_path):
    """As any program computes it that knows Llama only: causal attention, positions 0, 1, …"""
    fields = {"objective": "eso_b", "alpha_0": 0.0} | PRETRAINED["llama3"]
    workdir, out = make_run(tmp_path / "run", **fields), tmp_path / "out"
    plain = f"--to=hub:{out}", "--layout=plain"
    assert command("export", f"--workdir={workdir}", *plain) == 0
    llama = in_memory.read(str(out), "cpu")
    ours = esolm_jax.load(workdir)
    text = np.random.default_rng(0).integers(0, 256, (2, LENGTH)).astype(np.int32)
    text[:, 5:] = ours.mask_id
    index = np.tile(np.arange(6, dtype=np.int32), (2, 1))
    tokens = Tokens(text[:, :6], index, index, np.ones(index.shape, bool))
    logits = jax.jit(model_lib.bind(llama.model))(llama.params, tokens)[:, 5]
    wanted = ours.logits(text)[:, 5]
    np.testing.assert_allclose(logits[:, : wanted.shape[1]], wanted, rtol=0, atol=2e-5)


# Nothing of a folder of the hub is lost.


@pytest.fixture
def long_qwen(tmp_path):
    """Qwen 2 in bfloat16, tied, for long texts, with all files of its tokenizer."""
    folder = pathlib.Path(shutil.copytree(HF / "qwen2", tmp_path / "qwen"))
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    rounded = {name: array.astype(jax.numpy.bfloat16) for name, array in tensors.items()}
    safetensors.numpy.save_file(rounded, folder / "model.safetensors", {"format": "pt"})
    changes = {"dtype": "bfloat16", "max_position_embeddings": 131072, "use_cache": False}
    changes |= {"eos_token_id": [59, 60], "_name_or_path": "a/qwen"}
    rewrite(folder / "config.json", lambda content: content.update(changes))
    others = {
        "tokenizer_config.json": '{"bos_token": "<|endoftext|>", "model_max_length": 131072}',
        "generation_config.json": '{"eos_token_id": [59, 60], "top_p": 0.8}',
        "chat_template.jinja": "{{ messages }}",
        "special_tokens_map.json": '{"eos_token": "<|endoftext|>"}',
        "LICENSE": "free",
    }
    for name, content in others.items():
        (folder / name).write_text(content)
    return folder


def test_a_folder_of_the_hub_comes_back_as_it_was(long_qwen, tmp_path):
    workdir, out = tmp_path / "run", tmp_path / "out"
    assert command("convert", f"--from={long_qwen}", f"--workdir={workdir}", ONE) == 0
    assert command("export", f"--workdir={workdir}", f"--to=hub:{out}", ONE) == 0
    found = {path.name for path in out.iterdir()}
    assert found == {path.name for path in long_qwen.iterdir()} - {"expected.npz"} | {"README.md"}
    for name in sorted(found - {"README.md", "config.json", "model.safetensors"}):
        assert (out / name).read_bytes() == (long_qwen / name).read_bytes(), name
    wanted = json.loads((long_qwen / "config.json").read_text())
    assert json.loads((out / "config.json").read_text()) == wanted
    wanted = safetensors.numpy.load_file(long_qwen / "model.safetensors")
    tensors = safetensors.numpy.load_file(out / "model.safetensors")
    assert tensors.keys() == wanted.keys()
    for name, array in wanted.items():
        assert tensors[name].dtype == array.dtype
        np.testing.assert_array_equal(tensors[name], array, err_msg=name)


# Tokenizers.


@pytest.fixture(scope="module")
def sentencepiece_model():
    text = "to be or not to be\nthat is the question, whether 'tis nobler  in the mind\t"
    return train_sentencepiece(iter([text, text[::-1], "é naïve"] * 20), 320)


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
def test_tokenizer_json_of_published_runs_encodes_as_ours(kind):
    ours = wordpieces.read(GOLDEN / f"tokenizer_{kind}")
    files = tokenizer_files.files(ours, with_mask=True)
    theirs = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
    for text in ("to be, or not to be", "That  is the question\n", "he said"):
        assert theirs.encode(text).ids == ours.encode(text)
    assert theirs.encode("to [MASK]").ids[-1] == ours.mask_id
    settings = json.loads(files["tokenizer_config.json"])
    ids = {role: theirs.token_to_id(settings[f"{role}_token"]) for role in ("bos", "eos", "pad")}
    assert ids == {role: getattr(ours, f"{role}_id") for role in ids}


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_tokenizer_json_encodes_and_decodes_as_ours(sentencepiece_model, kind):
    ours = Bytes() if kind == "bytes" else sentencepiece_model
    files = tokenizer_files.files(ours, with_mask=True)
    theirs = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
    rng = random.Random(0)
    parts = [*"abtoheris  \n\t.'éü漢🙂", "to be", " the", "nobler"]
    for _ in range(300):
        text = "".join(rng.choices(parts, k=rng.randint(0, 30)))
        assert theirs.encode(text).ids == ours.encode(text)
        assert theirs.decode(ours.encode(text)) == text
    assert theirs.encode("a[MASK]").ids == [*ours.encode("a"), ours.mask_id]
    settings = json.loads(files["tokenizer_config.json"])
    ids = {role: theirs.token_to_id(settings[f"{role}_token"]) for role in ("bos", "eos", "pad")}
    assert ids == {role: getattr(ours, f"{role}_id") for role in ids}


def test_tokenizer_json_of_text8_encodes_as_published():
    ours = Text8()
    files = tokenizer_files.files(ours, with_mask=True)
    theirs = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
    rng = random.Random(0)
    parts = [*"abz  \n\t.1éßİΣK漢🙂", "ToBe", "[MASK]", "[EOS]", "[UNK]", "[RESERVED]", "[mask]"]
    for _ in range(300):
        text = "".join(rng.choices(parts, k=rng.randint(0, 30)))
        assert theirs.encode(text).ids == ours.encode_recognizing(text)
    assert theirs.decode(ours.encode("to be or 2")) == ours.decode(ours.encode("to be or 2"))
    settings = json.loads(files["tokenizer_config.json"])
    for role in ("bos", "eos", "pad", "mask"):
        assert theirs.token_to_id(settings[f"{role}_token"]) == getattr(ours, f"{role}_id")


def test_mask_behind_a_padded_vocabulary_has_its_id(long_qwen):
    from esolm_jax.data.hub_tokenizer import HubTokenizer

    content = (long_qwen / "tokenizer.json").read_bytes()
    padded = HubTokenizer(content, {"vocab_size": 80, "bos": 59, "eos": 59, "pad": 59})
    assert padded.eot_id is None
    with_eot = json.loads(content)
    with_eot["added_tokens"].append(EOT | {"id": len(with_eot["model"]["vocab"])})
    ends = HubTokenizer(json.dumps(with_eot).encode(), padded.ids)
    assert ends.eot_id == len(with_eot["model"]["vocab"])
    made = tokenizer_files.files(padded, with_mask=True)["tokenizer.json"].decode()
    theirs = tokenizers.Tokenizer.from_str(made)
    assert theirs.token_to_id("[MASK]") == padded.mask_id == 80
    text = "he said, the end."
    assert theirs.encode(text, add_special_tokens=False).ids == padded.encode(text)


# Schedules: schedule_esolm.py needs NumPy only.


@pytest.mark.parametrize(
    ("name", "alpha_0", "steps"),
    [
        ("ancestral", 0.5, 0),
        ("ancestral", 1.0, 5),
        ("ancestral", 0.3, 4),
        ("strided", 0.5, 5),
        ("shuffled_strided", 1.0, 4),
        ("left_to_right", 0.5, 0),
        ("blockwise", 0.7, 6),
        ("blockwise", 1.0, 0),
    ],
)
def test_orders_and_steps_are_those_of_sample(name, alpha_0, steps):
    theirs = load_file("schedule_esolm", SHIPPED / "schedule_esolm.py")
    rng, length, batch, seed = np.random.default_rng(0), 17, 4, 11
    token = rng.integers(0, 9, (batch, length))
    known = rng.random((batch, length)) < np.array([0, 0.2, 0.5, 0.9])[:, None]
    seeds = tuple(Seed(seed, b) for b in range(batch))
    canvas = Canvas(token.astype(np.int32), known, np.full(batch, length), seeds)
    settings = schedule.ScheduleSettings(alpha_0, steps, block_length=4)
    ours = schedule.make(name, canvas, settings)
    fields = {"cached": True, "shift": 0, "schedule": name, "alpha_0": alpha_0, "steps": steps}
    passes = theirs.plan_passes(fields | {"block_length": 4}, known, seed)
    np.testing.assert_array_equal(passes.order, ours.order)
    np.testing.assert_array_equal(passes.size[1:], ours.sizes)  # the first pass reads the prompt
    np.testing.assert_array_equal(passes.first[1:], ours.first)
    np.testing.assert_array_equal(passes.end[0], ours.num_known)


# PyTorch.


@pytest.mark.parametrize("family", FAMILIES)
def test_pytorch_computes_our_logits_and_texts(exported, family):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    check = load_file("check_esolm", exported[family] / "check_esolm.py").check
    error, largest, greedy, drawn = check(str(exported[family]))
    assert error <= 2e-5 * max(1, largest)
    assert (greedy, drawn) == (1.0, 1.0)


def test_pytorch_labels_ids_as_our_api(runs, exported):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForMaskedLM.from_pretrained(
        str(exported["eso_b"]), trust_remote_code=True
    )
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 256, (3, LENGTH)).astype(np.int32)
    ids[rng.random(ids.shape) < 0.4] = model.config.mask_token_id
    with torch.no_grad():
        logits = model(torch.from_numpy(ids).long()).logits.numpy()
    wanted = esolm_jax.load(runs["eso_b"]).logits(ids)
    np.testing.assert_allclose(logits, wanted, rtol=0, atol=2e-5)
