"""Likelihoods of answers against LLaDA's and Dream's code, with its own masks."""

import dataclasses
import json

import numpy as np
import pytest
from golden_models import case, model, read_json, workdir
from thorough import thorough
from tiny_run import command

from esolm_jax.errors import UserError
from esolm_jax.evaluation import answers, masked_likelihood
from esolm_jax.evaluation.masked_likelihood import Draws, MaskedLikelihood
from esolm_jax.evaluation.protocol import multiple_choice

RELATIVE = 1e-5


def likelihood(name, rows=4, cfg=0.0):
    loaded = model(name)
    return MaskedLikelihood(
        loaded.config, loaded._built, loaded.params, rows, keeps_mask=True, cfg=cfg
    )


def cases(first, other):
    """All cases of the first model, and on demand those of another."""
    return [
        *((first, key) for key in read_json(first)["likelihood"]),
        *(pytest.param(other, key, marks=thorough) for key in read_json(other)["likelihood"]),
    ]


def logits_of(name):
    return lambda ids: np.asarray(model(name).logits(ids))


@pytest.mark.parametrize(("name", "key"), cases("llada_mha", "llada_gqa_tied"))
def test_llada(name, key):
    golden, settings = case(name, "likelihood", key), read_json(name)["likelihood"][key]
    prompt, answer = (golden[part].tolist() for part in ("prompt", "answer"))
    length = len(prompt) + len(answer)
    masked = golden["perturbed"].reshape(-1, length) == model(name).mask_id
    draws = Draws(masked, masked / golden["p_mask"].reshape(-1, 1))
    scorer = likelihood(name, cfg=settings["cfg_scale"])
    nll = scorer.nll(prompt + answer, draws, prompt=len(prompt))
    per_batch = nll.reshape(len(golden["loss_per_batch"]), -1).mean(axis=1)
    np.testing.assert_allclose(per_batch, golden["loss_per_batch"], rtol=RELATIVE)
    np.testing.assert_allclose(-nll.mean(), settings["log_likelihood"], rtol=RELATIVE)
    of_answer = masked[:, len(prompt) :]  # the plain function, of logits
    common = {"mask_id": model(name).mask_id, "cfg": settings["cfg_scale"]}
    plain = multiple_choice.llada_score(logits_of(name), prompt, answer, of_answer, **common)
    np.testing.assert_allclose(plain, settings["log_likelihood"], rtol=RELATIVE)


@pytest.mark.parametrize("name", ["llada_mha", pytest.param("llada_gqa_tied", marks=thorough)])
def test_greedy_answers_of_llada(name):
    for one in read_json(name)["suffix_greedy"]:
        for best in (likelihood(name).best_of(), multiple_choice.best_of(logits_of(name))):
            greedy = multiple_choice.llada_greedy_answer(
                best, one["prompt"], len(one["answer"]), mask_id=model(name).mask_id
            )
            assert (greedy == one["answer"]) == one["is_greedy"]


@pytest.mark.parametrize(("name", "key"), cases("dream", "dream_tied_bf16"))
def test_dream(name, key):
    golden, settings = case(name, "likelihood", key), read_json(name)["likelihood"][key]
    prefix, target = (golden[part].tolist() for part in ("prefix", "target"))
    masked = golden["perturbed"] == model(name).mask_id
    if "p_mask" in golden:
        weight = masked / golden["p_mask"][:, None]
    else:  # one token of each row is scored, the target's in turn
        weight = np.arange(masked.shape[1]) == len(prefix) + np.arange(len(target))[:, None]
    draws = Draws(masked, weight)
    nll = likelihood(name).nll(prefix + target, draws)
    if "p_mask" in golden:
        per_batch = nll.reshape(len(golden["loss_per_batch"]), -1).mean(axis=1)
        np.testing.assert_allclose(per_batch, golden["loss_per_batch"], rtol=RELATIVE)
        found = nll.mean()
    else:
        np.testing.assert_allclose(nll, golden["nll_per_token"], rtol=RELATIVE)
        found = nll.sum()
    np.testing.assert_allclose(found, settings["nll"], rtol=RELATIVE)


def test_drawn_masks():
    """Exactly what the protocols say of them."""
    rng = np.random.default_rng(0)
    drawn = masked_likelihood.llada_draws(rng, 3, 5, 40, 8)
    count = drawn.masked.sum(axis=1)
    assert not drawn.masked[:, :3].any() and set(count) == {1, 2, 3, 4, 5}
    np.testing.assert_allclose(drawn.weight.sum(axis=1), 5, rtol=1e-6)
    drawn = masked_likelihood.dream_draws(rng, 3, 6, 4000, 8)
    assert not drawn.masked[:, [0, 1, 2, 8]].any()
    # E[1/p · 1(masked)] = 1 for each token; p ≥ ε, so the spread is that of √(1/p) ≤ √(log 1/ε).
    np.testing.assert_allclose(drawn.weight[:, 3:8].mean(axis=0), 1, atol=0.25)


@pytest.mark.parametrize("name", [pytest.param("llada_mha", marks=thorough), "dream"])
def test_evaluate_answers(name, tmp_path):
    """The verb's value is that of the plain functions, with the same draws."""
    pairs = [{"prompt": "The river ran ", "answer": "past the mill", "id": 7}]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    flags = f"--answers={tmp_path}/pairs.jsonl", "--draws=6", "--config.eval.batch_size=2"
    assert command("evaluate", f"--workdir={workdir(name)}", *flags) == 0
    (row,) = map(json.loads, (workdir(name) / "answers.jsonl").read_text().splitlines())
    tokenizer = model(name).tokenizer
    prompt, answer = multiple_choice.encode_pair(
        tokenizer.encode, pairs[0]["prompt"], pairs[0]["answer"]
    )
    answer = [*answer, tokenizer.eos_id] if name == "dream" else answer
    make = masked_likelihood.dream_draws if name == "dream" else masked_likelihood.llada_draws
    drawn = make(np.random.default_rng(0), len(prompt), len(answer), 6, 2)
    ids = np.where(drawn.masked, model(name).mask_id, np.array([*prompt, *answer]))
    log_p = multiple_choice.log_softmax(logits_of(name)(ids))
    if name == "dream":
        log_p = np.roll(log_p, 1, axis=1)
    of_text = np.take_along_axis(log_p, np.array([*prompt, *answer])[None, :, None], axis=-1)
    wanted = (drawn.weight * of_text[..., 0]).sum(axis=1).mean()
    np.testing.assert_allclose(row["log_likelihood"], wanted, rtol=RELATIVE)
    assert (row["tokens"], row["id"]) == (len(answer), 7)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", "holds no answers"),
        ('{"prompt": "a"}', "must be an object with the texts `prompt` and `answer`"),
        ('{"prompt": "a", "answer": ""}', "must not be empty"),
    ],
)
def test_bad_answers(line, words, tmp_path, capsys):
    (tmp_path / "pairs.jsonl").write_text(line + "\n")
    given = f"--workdir={workdir('dream')}", f"--answers={tmp_path}/pairs.jsonl"
    assert command("evaluate", *given, "--config.mesh.devices=1") == 2
    assert words in capsys.readouterr().err


def test_other_families_are_refused():
    loaded = model("sdar")
    with pytest.raises(UserError, match="objective='bd3': must be mdlm or mdlm_shifted"):
        answers.score(loaded.config, None, loaded.tokenizer, [], 4)


@pytest.mark.parametrize(
    ("meta", "keeps"),
    [
        ({"converted": {"model_type": "llada"}}, True),
        ({"converted": {"model_type": "esolm"}}, False),  # our own export
        ({"converted": {"file": "eso.ckpt"}}, False),
        ({"converted": True}, False),
        ({}, False),
    ],
)
def test_whose_mask_token_keeps_its_probability(meta, keeps):
    assert masked_likelihood.is_pretrained(meta) == keeps


def test_the_mask_token_of_our_own_models_has_no_probability():
    """Without it, the others have its share."""
    ids, draws = [5, 6, 7], Draws(np.array([[False, True, True]]), np.array([[0.0, 1, 2]]))
    kept, left_out = (
        dataclasses.replace(likelihood("llada_mha"), keeps_mask=keeps).nll(ids, draws)[0]
        for keeps in (True, False)
    )
    mask_id = model("llada_mha").mask_id
    log_p = multiple_choice.log_softmax(logits_of("llada_mha")(np.array([[5, mask_id, mask_id]])))[
        0
    ]
    share = -np.log1p(-np.exp(log_p[1:, mask_id]))  # of the mask, in nats
    assert kept - left_out == pytest.approx(share @ [1, 2], rel=1e-3)
