"""Generative perplexity and entropy against the published metrics, on the same texts and judge."""

import doctest
import math
import pathlib
import shutil

import numpy as np
import pytest
from golden_eval import FOLDER, read_json, read_npz

from esolm_jax.errors import UserError
from esolm_jax.evaluation import protocol
from esolm_jax.evaluation.protocol.published_perplexity import pooled_token_nll

GOLDEN = read_json("genppl/cases.json")
TEXTS = GOLDEN["samples"]
TOLERANCE, TOLERANCE_OF_A_TEXT = 2e-5, 1e-4  # relative
PUBLISHED_FLOAT32 = 1e-5  # relative: the published sums are float32


@pytest.fixture(scope="module")
def judge():
    return protocol.Judge(FOLDER / "genppl" / "judge", rows=4)


def calls(judge, case, variant, **settings) -> list[dict]:
    """The result of each call of the metric."""
    names = ("max_length", "batch_size")
    settings |= {name: case[name] for name in names}
    return [
        protocol.generative_perplexity(
            judge, [TEXTS[i] for i in indices], variant=variant, **settings
        )
        for indices in case["calls"]
    ]


def joined(results: list[dict], name: str) -> np.ndarray:
    return np.concatenate([result[name] for result in results])


def total(results: list[dict], name: str) -> float:
    return sum(result[name] for result in results)


def close(got, want, tolerance):
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=0)


def test_texts_are_tokenized_with_the_specials_they_spell_out(judge):
    assert [len(ids) for ids in judge.encode(TEXTS)] == GOLDEN["tokens_per_sample"]
    assert judge.encode(["<|endoftext|>"]) == [[GOLDEN["eos_token_id"]]]


@pytest.mark.parametrize("case", GOLDEN["pooled"], ids=lambda case: case["id"])
def test_pooled(judge, case):
    results = calls(judge, case, "pooled")
    want = case["float64"]
    assert total(results, "num_tokens") == want["sum_count"]
    nll = total(results, "nll")
    close(nll, want["sum_nll"], TOLERANCE)
    close(math.exp(nll / want["sum_count"]), want["ppl"], TOLERANCE)
    close(math.exp(nll / want["sum_count"]), case["ppl"], PUBLISHED_FLOAT32)
    if len(results) == 1:
        close(results[0]["perplexity"], want["ppl"], TOLERANCE)
    _, text_nll, counts = zip(*want["per_sample"], strict=True)
    assert joined(results, "text_num_tokens").tolist() == list(counts)
    close(joined(results, "text_nll"), text_nll, TOLERANCE)
    assert total(results, "num_dropped") == sum(map(len, case["calls"])) - len(counts)


def test_pooled_tokens(judge):
    golden = read_npz("genppl/tokens_pooled_1500.npz")
    nll, scored = pooled_token_nll(judge, golden["ids"])
    np.testing.assert_array_equal(scored, golden["valid"])
    np.testing.assert_allclose(nll, np.where(scored, golden["nll"], 0), rtol=0, atol=TOLERANCE)


def test_pooled_ids(judge):
    case = GOLDEN["pooled_ids"]
    found = protocol.generative_perplexity(judge, case["ids"], batch_size=case["batch_size"])
    assert (found["num_tokens"], found["num_dropped"]) == (case["float64"]["sum_count"], 1)
    close(found["nll"], case["float64"]["sum_nll"], TOLERANCE)
    close(found["perplexity"], case["ppl"], PUBLISHED_FLOAT32)


def test_pooled_depends_on_which_texts_share_a_call(judge):
    """The fault that is reproduced: a short text's first pad is scored if a longer one is there."""
    alone = protocol.generative_perplexity(judge, TEXTS[:1])
    together = protocol.generative_perplexity(judge, [TEXTS[0], TEXTS[4]])
    assert together["text_num_tokens"][0] == alone["num_tokens"] + 1


@pytest.mark.parametrize("case", GOLDEN["bd3"], ids=lambda case: case["id"])
def test_bd3(judge, case):
    names = ("stride", "perplexity_batch_size")
    results = calls(judge, case, "bd3", **{name: case[name] for name in names})
    nll, counts, entropies = np.array(case["float64"]).T
    assert joined(results, "batch_num_tokens").tolist() == counts.tolist()
    close(total(results, "nll"), nll.sum(), TOLERANCE)
    assert total(results, "num_tokens") == counts.sum()
    published = np.array(case["gen_ppls"], float)  # None → NaN
    found = joined(results, "batch_perplexities")
    close(found, published, TOLERANCE_OF_A_TEXT)  # NaN where theirs is
    with np.errstate(invalid="ignore"):
        close(found, np.exp(nll / counts), TOLERANCE_OF_A_TEXT)
    close(joined(results, "batch_entropies"), entropies, PUBLISHED_FLOAT32)
    np.testing.assert_allclose(np.mean(joined(results, "batch_entropies")),
                               case["gen_entropy_metric"], rtol=0, atol=1e-5)  # fmt: skip
    if len(results) == 1:
        close(results[0]["perplexity"], case["summary"]["mean_gen_ppl"], TOLERANCE_OF_A_TEXT)
        close(results[0]["entropy"], case["summary"]["mean_entropy"], PUBLISHED_FLOAT32)


def test_entropy():
    everything = []
    for call in GOLDEN["entropy"]["calls"]:
        found = protocol.entropy(call["ids"])
        np.testing.assert_allclose(found, call["per_sample"], rtol=0, atol=1e-5)
        np.testing.assert_allclose(found.mean(), call["mean"], rtol=0, atol=1e-5)
        everything.append(found)
    mean = np.concatenate(everything).mean()
    np.testing.assert_allclose(mean, GOLDEN["entropy"]["mean_of_all_samples"], rtol=0, atol=1e-5)


def test_entropy_of_one_sequence():
    assert protocol.entropy([1, 1, 2, 2]) == pytest.approx(math.log(2))
    assert protocol.entropy(np.array([[3, 3]], np.int32)).tolist() == [0]
    assert protocol.entropy([]) == 0


def test_scores_depend_neither_on_the_rows_of_a_pass_nor_on_the_other_texts(judge):
    ids = np.full((3, 40), judge.eos_id, np.int32)
    for row, text in zip(ids, judge.encode(["Lamp small", "A letter", "Two gulls"]), strict=True):
        row[: len(text)] = text
    scored = np.arange(40)[None] > np.zeros((3, 1))
    together = judge.score(ids, scored)
    np.testing.assert_allclose(judge.score(ids[1:2], scored[1:2]), together[1:2], atol=1e-5)


@pytest.mark.parametrize("variant", ["pooled", "bd3"])
def test_nothing_to_score(judge, variant):
    found = protocol.generative_perplexity(judge, ["", ""], variant=variant)
    assert (found["nll"], found["num_tokens"]) == (0, 0) and math.isnan(found["perplexity"])


@pytest.mark.parametrize(
    "texts, settings, message",
    [
        ("a text", {}, "texts: must be a list of texts"),
        ([], {}, "texts: must have at least one text"),
        (["a", [1]], {}, "texts: must be all texts, or all rows"),
        ([[1, 2], [3]], {}, "rows of token ids of equal length"),
        ([[1, 300]], {}, "texts: token id 300: must be below the judge's 300"),
        ([[1] * 1025], {}, "context_length=1025: must be at most 1024"),
        (["a"], {"variant": "bd"}, r"variant='bd': must be pooled or bd3"),
        (["a"], {"batch_size": 0}, "batch_size=0: must be positive"),
    ],
)
def test_bad_arguments(judge, texts, settings, message):
    with pytest.raises(UserError, match=message):
        protocol.generative_perplexity(judge, texts, **settings)


def test_examples_of_the_page_run(judge):
    names = {
        "judge_folder": FOLDER / "genppl" / "judge",
        "bert_folder": FOLDER / "tokenizer_wordpiece",
    }
    names["gpt2_folder"] = FOLDER / "tokenizer_bpe"
    page = pathlib.Path(__file__).parents[2] / "docs" / "evaluation_protocol.md"
    found = doctest.testfile(str(page), module_relative=False, globs=names, encoding="utf-8")
    assert found.failed == 0 and found.attempted > 15


def test_judge_without_a_tokenizer(tmp_path):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(FOLDER / "genppl" / "judge" / name, tmp_path)
    with pytest.raises(UserError, match="holds no tokenizer"):
        protocol.Judge(tmp_path)


def test_judge_of_another_family():
    """Log-probabilities are those of `transformers`' logits."""
    folder = pathlib.Path(__file__).parents[1] / "fixtures" / "hf" / "llama"
    with np.load(folder / "expected.npz") as file:
        ids, logits = file["tokens"].astype(np.int32), file["logits"].astype(np.float64)
    scored = np.ones(ids.shape, bool)
    scored[:, 0] = False
    log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    want = -np.take_along_axis(log_p[:, :-1], ids[:, 1:, None], axis=-1)[..., 0]
    found = protocol.Judge(folder, rows=2).score(ids, scored)
    np.testing.assert_allclose(found[:, 1:], want, rtol=0, atol=TOLERANCE)
