"""The public API computes what the verbs compute; the examples of its page run."""

import dataclasses
import doctest
import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
import styles
import tiny_run
from compilation import compiling
from golden_files import HEADS, vectors
from tiny_run import LENGTH, command  # noqa: F401

import esolm_jax
from esolm_jax.data.manifest import tokenizer_entry
from esolm_jax.data.tokenizer import Bytes
from esolm_jax.errors import UserError
from esolm_jax.family.labels import Tokens
from esolm_jax.interop import reference
from esolm_jax.interop.published import names as published_names
from esolm_jax.language_model import LanguageModel
from esolm_jax.model import build, transformer
from esolm_jax.parallel import sharding
from esolm_jax.training import restore

ROOT = pathlib.Path(__file__).resolve().parents[2]
FAMILIES = ("eso_b", "eso_a", "mdlm", "bd3", "ar")


@pytest.fixture(scope="module")
def data(tmp_path_factory):  # noqa: F811
    return tiny_run.write_data(tmp_path_factory.mktemp("text"), **{"data.packing": "pad"})


@pytest.fixture(scope="module")
def workdir(data, tmp_path_factory):
    """The workdir of an Eso-LM (B) after two steps."""
    folder = tmp_path_factory.mktemp("eso_b")
    config = tiny_run.make_config(data | {"train.steps": 2, "train.eval_windows": 4})
    with compiling(fast=True):  # its weights do not matter
        tiny_run.train(config, folder)
    jax.clear_caches()
    return folder


@pytest.fixture(scope="module")
def model(workdir):
    return esolm_jax.load(workdir)


def untrained(objective: str) -> LanguageModel:
    """A model of a family with random weights."""
    config = tiny_run.make_config({"objective": objective, "block_length": 4, "data.train": "-"})
    mesh, tokenizer = sharding.make_mesh(config.mesh), Bytes()
    built = build.build_model(config, tokenizer_entry(tokenizer), mesh)
    trained = restore.TrainedModel(built, styles.params_of(built.model), meta={}, step=0)
    return LanguageModel(config, trained, tokenizer)


def test_examples_of_the_page_run(workdir):
    names = {"workdir": str(workdir), "weights": vectors("weights_dit")}
    found = doctest.testfile(
        str(ROOT / "docs" / "python_api.md"),
        module_relative=False,
        globs=names,
        encoding="utf-8",
        optionflags=doctest.ELLIPSIS,
    )
    assert found.failed == 0 and found.attempted > 15


def test_import_is_light():
    code = (
        "import esolm_jax, sys; esolm_jax.__version__; dir(esolm_jax); print('jax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "False\n"
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        esolm_jax.lode  # noqa: B018


def test_samples_are_those_of_the_verb(workdir, model):
    asked = ["--prompt=to be[MASK:3]x[MASK]", "--prompt=or"]
    settings = {"seed": 5, "num_texts": 2, "top_p": 0.9, "steps": 4}
    flags = [f"--config.sample.{name}={value}" for name, value in settings.items()]
    assert command("sample", f"--workdir={workdir}", *asked, *flags) == 0
    lines = (workdir / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    prompts = ["to be[MASK:3]x[MASK]", "or"]
    assert model.sample(prompts, **settings) == texts
    assert len(set(texts)) == 4 and all(text.startswith("or") for text in texts[2:])
    assert model.sample(prompts, **settings | {"seed": 6}) != texts


def labels_of(objective: str, ids, start: int, mask: int) -> Tokens:
    """The labels by the definition of the family; clean tokens and masks from left to right."""
    position = np.broadcast_to(np.arange(LENGTH), ids.shape)
    order = np.argsort(ids == mask, axis=1, kind="stable")
    in_order, yes = np.take_along_axis(ids, order, axis=1), np.ones(ids.shape, bool)
    match objective:
        case "ar":
            shifted = np.insert(ids[:, :-1], 0, start, axis=1)
            labels = shifted, position, position, yes
        case "mdlm":
            labels = ids, position, 0 * position, yes
        case "bd3":  # query copies, then the context
            twice = [np.concatenate([a, a], axis=1) for a in (ids, position, position // 4)]
            labels = *twice, np.concatenate([~yes, yes], axis=1)
        case "eso_a":
            labels = in_order, order, np.where(in_order == mask, position, 0), yes
        case "eso_b":
            labels = in_order, order, position, yes
    return Tokens(*map(np.asarray, labels))


@pytest.mark.parametrize("objective", FAMILIES)
def test_logits_of_ids_are_those_of_the_labels(objective):
    model = untrained(objective)
    ids = np.random.default_rng(0).integers(0, 256, (2, LENGTH))
    if objective in ("ar", "bd3"):
        ids[:, LENGTH - 4 :] = model.mask_id  # the last block of bd3
    else:
        ids[0, [1, 4, 9]] = ids[1, 3:] = model.mask_id
    tokens = labels_of(objective, ids, model.tokenizer.bos_id, model.mask_id)
    bound = transformer.bind(dataclasses.replace(model._built.model, attention="dense"))
    with compiling(fast=True):  # expected values
        direct = np.asarray(jax.jit(bound)(model.params, tokens))[:, :LENGTH]
    arrays = tokens.token, tokens.position, tokens.rank, tokens.in_context
    np.testing.assert_allclose(model.logits(*arrays)[:, :LENGTH], direct, atol=2e-5)
    found = np.asarray(model.logits(ids))
    assert found.shape == (2, LENGTH, model._built.model.vocab_size)
    by_rank = np.take_along_axis(found, tokens.position[:, :LENGTH, None], axis=1)
    is_mask = tokens.token[:, :LENGTH] == model.mask_id
    predicted = np.ones_like(is_mask) if objective == "ar" else is_mask
    np.testing.assert_allclose(by_rank[predicted], direct[predicted], atol=2e-5)
    assert np.ptp(found, axis=1).max() > 0.1


@pytest.mark.parametrize("orders", [0, 4])
def test_log_likelihood_is_that_of_evaluate(workdir, data, model, orders):
    """Of the documents of the test split, with the same draws."""
    settings = [f"--config.eval.num_orders={orders}", "--config.eval.num_samples=3"]
    settings.append("--config.eval.max_windows=0")
    assert command("evaluate", f"--workdir={workdir}", *settings) == 0
    result = json.loads((workdir / "evaluate.json").read_text())["results"][-1]
    lines = pathlib.Path(data["data.test"]).read_text().splitlines()
    texts = [json.loads(line)["text"][:LENGTH] for line in lines]
    found = model.log_likelihood(texts, num_samples=3, num_orders=orders)
    assert found.bound == result["bound"] == ("importance_weighted" if orders else "nelbo")
    assert found.nll_per_token == pytest.approx(result["nll_per_token"], rel=1e-6)
    assert found.standard_error == pytest.approx(result["standard_error"], rel=1e-4)
    assert found.values.shape == found.num_tokens.shape == (len(texts),)
    assert -found.values.sum() / found.num_tokens.sum() == pytest.approx(found.nll_per_token)
    assert found.num_tokens.tolist() == [min(len(text) + 1, LENGTH) for text in texts]
    again = model.log_likelihood(texts, num_samples=3, num_orders=orders, seed=7)
    assert again.nll_per_token != found.nll_per_token


@pytest.mark.parametrize(
    "settings", [{"schedule": "strided"}, {"loop": "confidence"}, {"schedule": "ancestral"}]
)
def test_likelihood_of_the_sampler_is_that_of_evaluate(workdir, data, model, settings):
    """Of the windows of the test split: documents with EOS."""
    flags = [f"--config.sample.{name}={value}" for name, value in settings.items()]
    flags += ["--config.eval.metrics=sampler", "--config.eval.max_windows=0"]
    assert command("evaluate", f"--workdir={workdir}", *flags, "--config.eval.num_samples=3") == 0
    (result,) = json.loads((workdir / "evaluate.json").read_text())["results"]
    lines = pathlib.Path(data["data.test"]).read_text().splitlines()
    encode, eos = model.tokenizer.encode, model.tokenizer.eos_id
    rows = [[*encode(json.loads(line)["text"]), eos][:LENGTH] for line in lines]
    drawn = "ancestral" in settings.values()
    found = model.sampler_log_likelihood(rows, num_orders=3 * drawn, **settings)
    assert result["bound"] == ("sampler_importance_weighted" if drawn else "sampler")
    assert found.bound == ("importance_weighted" if drawn else "exact")
    assert result["sample"]["schedule"] == settings.get("schedule", "ancestral")
    assert found.nll_per_token == pytest.approx(result["nll_per_token"], rel=1e-5)
    assert found.standard_error == pytest.approx(result["standard_error"] or 0, rel=1e-3)
    assert (found.standard_error > 0) == drawn


def test_log_likelihood_of_ar_is_exact():
    model = untrained("ar")
    found = model.log_likelihood("to be")
    ids = np.array([[*model.tokenizer.encode("to be"), model.tokenizer.eos_id]])
    logits = np.array(model.logits(ids), np.float64)
    logits[..., model.mask_id] = -np.inf
    log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    want = np.take_along_axis(log_p, ids[..., None], axis=-1).sum()
    assert (found.bound, found.standard_error) == ("exact", 0)
    assert found.values[0] == pytest.approx(want, rel=1e-5)


def test_weights_and_steps(workdir, model):
    raw = esolm_jax.load(workdir, weights="raw", step=2)
    assert raw.step == model.step == 2
    same = [np.array_equal(*pair) for pair in zip(raw.params["logits"].values(),
            model.params["logits"].values(), strict=True)]  # fmt: skip
    assert not all(same)


def test_published_weights():
    weights = vectors("weights_dit")
    model = esolm_jax.load_published(weights, HEADS)
    assert reference.load is published_names.load
    assert isinstance(model, published_names.PublishedModel)
    index = np.arange(6)[None]
    labels = index, index, index, np.ones((1, 6), bool)
    arrays = model.logits(*labels)
    np.testing.assert_array_equal(arrays, model.logits(Tokens(*labels)))
    with pytest.raises(UserError, match="rank: missing"):
        model.logits(index, index)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda m, w: esolm_jax.load(w, step="first"), "step='first': must be a step"),
        (lambda m, w: esolm_jax.load(w, step=9), "9"),
        (lambda m, w: esolm_jax.load(w, weights="all"), "weights='all': must be ema or raw"),
        (lambda m, w: esolm_jax.load(w, overrides={"model.widht": 1}), "did you mean"),
        (lambda m, w: esolm_jax.load(w, overrides={"model.width": 32}), "model.width"),
        (lambda m, w: m.sample(temprature=1), "config.sample.temprature: unknown field"),
        (lambda m, w: m.sample(top_p="high"), "config.sample.top_p='high': must be float"),
        (lambda m, w: m.sample("x" * 99), r"prompts\[0\]: has more tokens"),
        (lambda m, w: m.log_likelihood([]), "texts: must have at least one"),
        (lambda m, w: m.log_likelihood(["a", "x" * 99]), r"texts\[1\]: has 99 tokens"),
        (lambda m, w: m.log_likelihood("a", num_samples=0), "config.eval.num_samples=0"),
        (lambda m, w: m.sampler_log_likelihood("a"), "num_orders=0: must be positive"),
        (lambda m, w: m.logits([[1, 2]]), "text 0: must have a mask"),
        (lambda m, w: m.logits([1, 2]), r"must be integers \[B, L\]"),
        (lambda m, w: m.logits([[1, 999]]), "token 999"),
        (lambda m, w: m.logits([[1]], position=[[0]]), "rank: missing"),
    ],
)
def test_bad_input_is_told(workdir, model, call, told):
    with pytest.raises(UserError, match=told):
        call(model, workdir)
