"""Multiple-choice scores against LLaDA's and Duo's harnesses, with a formula as the model."""

import math

import numpy as np
import pytest
from golden_eval import FOLDER, read_json

from esolm_jax.data import wordpieces
from esolm_jax.errors import UserError
from esolm_jax.evaluation.protocol import multiple_choice as mc

GOLDEN = read_json("mc.json")
TOLERANCE = 1e-4  # relative


def formula(ids: np.ndarray, num_ids: int, mask_id: int, causal: bool = False) -> np.ndarray:
    """Logits [B, n, V] of the vectors' model; see their README."""
    n = ids.shape[1]
    i, j, v = np.ogrid[:n, :n, :num_ids]
    base = 1.5 * np.sin(1 + 0.7 * np.arange(n)[:, None] + 1.3 * np.arange(num_ids))
    phase = 0.3 * (ids[:, None, :, None] + 1) * (v + 1) + 0.5 * (i - j)
    reads = (ids != mask_id)[:, None, :, None] & ((j <= i) | (not causal))
    return base + (np.cos(phase) / (1 + abs(i - j)) * reads).sum(axis=2)


def bits(masks: list[str]) -> np.ndarray:
    return np.array([[bit == "1" for bit in mask] for mask in masks])


def choices(name: str) -> list:
    return [
        pytest.param(case, choice, id=f"{number}-{choice['answer']}")
        for number, case in enumerate(GOLDEN[name])
        for choice in case["choices"]
    ]


def test_stratified_counts():
    for case in GOLDEN["stratified"]:
        assert mc.stratified_counts(case["N"], case["b"], case["k"]).tolist() == case["l"]


def test_drawn_masks():
    masks = mc.draw_masks(np.random.default_rng(0), 4, 4000, 4)
    assert np.bincount(masks.sum(axis=1)).tolist() == [0, 1000, 1000, 1000, 1000]
    np.testing.assert_allclose(masks.mean(axis=0), 2.5 / 4, atol=0.03)
    with pytest.raises(UserError, match="rows=3: must divide num_draws=4"):
        mc.draw_masks(np.random.default_rng(0), 4, 4, 3)


def test_counts_with_halves_are_not_uniform():
    """The fault that is reproduced: halves are rounded to even numbers."""
    counts = np.concatenate([mc.stratified_counts(4, 8, first) for first in (1, 2, 3, 4)])
    assert np.bincount(counts).tolist() == [0, 4, 12, 4, 12]


@pytest.mark.parametrize("case, choice", choices("llada"))
def test_llada(case, choice):
    def logits_of(ids):
        return formula(ids, case["V"], case["mask_id"])

    masks, answer = bits(choice["masks"]), choice["answer"]
    np.testing.assert_allclose(masks.mean(axis=1), choice["masked_fraction"], rtol=1e-6)
    settings = {"mask_id": case["mask_id"], "cfg": case["cfg"]}
    found = mc.llada_score(logits_of, case["prompt"], answer, masks, **settings)
    assert found == pytest.approx(choice["loglikelihood"], rel=TOLERANCE)
    guided = mc.with_guidance(logits_of, len(case["prompt"]), case["mask_id"], case["cfg"])
    greedy = mc.llada_greedy_answer(
        mc.best_of(guided), case["prompt"], len(answer), mask_id=case["mask_id"]
    )
    assert greedy == choice["greedy_answer"]
    assert (greedy == answer) == choice["is_greedy"]


@pytest.mark.parametrize("case, choice", choices("duo"))
def test_duo(case, choice):
    mode, mask_id, answer = case["mode"], case["mask_id"], choice["answer"]

    def logits_of(ids):
        return formula(ids, case["V"], mask_id, causal=mode == "ar")

    sentence = [case["bos"], *case["prompt"], *answer, case["eos"]]
    prefix = 1 + len(case["prompt"])
    if mode == "ar":
        found = mc.duo_ar_score(logits_of, sentence, prefix=prefix)
    else:
        masks, settings = bits(choice["masks"]), {"prefix": prefix, "mask_id": mask_id}
        if mode == "full":
            found = mc.duo_full_score(logits_of, sentence, masks, choice["t"], mask_id=mask_id)
        else:
            found = mc.duo_suffix_score(logits_of, sentence, masks, **settings)
        one_pass = mc.duo_one_pass_answer(mc.best_of(logits_of), sentence, **settings)
        assert one_pass == choice["one_pass_answer"]
        assert (one_pass == answer) == choice["is_greedy"]
    want = math.nan if choice["loglikelihood"] is None else choice["loglikelihood"]
    np.testing.assert_allclose(found, want, rtol=TOLERANCE)


@pytest.mark.parametrize("name", ["llada", "duo"])
def test_best_choice(name):
    for case in GOLDEN[name]:
        scores = [choice["loglikelihood"] for choice in case["choices"]]
        if None not in scores:
            assert int(np.argmax(scores)) == case["best"]


@pytest.mark.parametrize("case", GOLDEN["encode_pair"], ids=lambda case: repr(case["context"]))
def test_encode_pair(case):
    encode = wordpieces.read(FOLDER / "tokenizer_bpe").encode
    found = mc.encode_pair(encode, case["context"], case["continuation"])
    assert found == (case["context_ids"], case["continuation_ids"])
