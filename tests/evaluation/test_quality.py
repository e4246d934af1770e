"""Metrics of generated texts, against their definitions."""

import itertools
import json
import math

import numpy as np
import pytest
from golden_eval import FOLDER, read_json

from esolm_jax.config import default_config
from esolm_jax.errors import UserError
from esolm_jax.evaluation import protocol
from esolm_jax.evaluation.quality import diversity, kmeans, mauve, metrics, perplexity, text_file
from esolm_jax.evaluation.quality.judged import Judged, QualitySettings
from esolm_jax.evaluation.quality.text_file import Texts
from esolm_jax.parallel import sharding

pytestmark = pytest.mark.fast_compile
JUDGE = FOLDER / "genppl" / "judge"
TEXTS = Texts("texts", read_json("genppl/cases.json")["samples"][:8])


@pytest.fixture(scope="module")
def judge():
    return protocol.Judge(JUDGE, rows=4)


def judged(judge, texts=TEXTS, **settings):
    return Judged(texts, judge, QualitySettings(**settings))


# Perplexity


def test_per_text_is_the_published_figure_of_each_text_alone(judge):
    """On texts without EOS, which the published variant counts once."""
    texts = [text.replace("<|endoftext|>", "")[:250] for text in TEXTS.texts]
    nll, count = perplexity.text_nll(judge, judge.encode(texts))
    for i, text in enumerate(texts):
        alone = protocol.generative_perplexity(judge, [text])
        assert count[i] == alone["num_tokens"]
        np.testing.assert_allclose(nll[i], alone["nll"], rtol=2e-6)


def test_every_token_but_the_first_counts(judge):
    ids = [[3, 4, judge.eos_id, judge.eos_id, 5], [7], []]
    _, count = perplexity.text_nll(judge, ids)
    assert count.tolist() == [4, 0, 0]


@pytest.fixture(scope="module")
def figures(judge):
    return figures_of(judge)


def figures_of(model) -> dict[str, float]:
    """Of texts of up to 200 tokens, and of MAUVE with other texts."""
    settings = QualitySettings(references=Texts("b", TEXTS.texts[:4]), max_length=200, clusters=3)
    found = metrics.judge(TEXTS, model, settings)["metrics"]
    return {
        f"{name}.{key}": value
        for name, entry in found.items()
        for key, value in entry.items()
        if isinstance(value, float)
    }


@pytest.mark.parametrize("devices, rows", [(1, 1), (1, 3), (1, 64), (8, 8)])
def test_figures_depend_neither_on_the_batch_nor_on_the_devices(figures, devices, rows):
    model = protocol.Judge(JUDGE, rows=rows, mesh=mesh_of(devices))
    assert figures_of(model) == pytest.approx(figures, rel=1e-6)


def mesh_of(devices: int):
    config = default_config().mesh
    config.devices, config.fsdp = devices, min(devices, 2)
    return sharding.make_mesh(config)


def test_standard_error_is_the_spread_over_sets_of_texts():
    rng = np.random.default_rng(0)
    count = rng.integers(5, 50, (2000, 40))
    nll = rng.normal(3.0, 0.5, count.shape) * count
    means = nll.sum(axis=1) / count.sum(axis=1)
    errors = [perplexity.standard_error(*pair) for pair in zip(nll, count, strict=True)]
    assert np.mean(errors) == pytest.approx(means.std(), rel=0.06)
    assert math.isnan(perplexity.standard_error(nll[0, :1], count[0, :1]))


def test_rows_must_divide_by_the_devices():
    with pytest.raises(UserError, match="batch_size=3: must be a positive multiple of"):
        protocol.Judge(JUDGE, rows=3, mesh=mesh_of(8))


@pytest.mark.parametrize("variant", ["pooled", "bd3"])
def test_published_variants(judge, variant):
    figures = perplexity.compute(judged(judge, variant=variant, published_batch_size=3))
    want = protocol.generative_perplexity(judge, TEXTS.texts, variant=variant, batch_size=3)
    assert {name: figures[name] for name in ("perplexity", "nll", "num_tokens")} == {
        name: want[name] for name in ("perplexity", "nll", "num_tokens")
    }
    assert figures["num_dropped"] == 2
    assert "2 texts dropped" in perplexity.line(figures)


# Diversity


def test_distinct_and_repetition():
    rows = [[1, 2, 1, 2, 1], [1, 2, 3]]
    assert diversity.distinct(rows, 1) == 3 / 8
    assert diversity.distinct(rows, 2) == 3 / 6  # 12 21 12 21, 12 23
    assert math.isnan(diversity.distinct(rows, 9))
    assert [*diversity.ngrams([1, 2, 3], 2)] == [(1, 2), (2, 3)]


def test_diversity_of_ids(judge):
    given = Texts("ids", token_ids=[[1, 2, 1, 2, 1], [1, 2, 3]])
    figures = metrics.judge(given, judge, QualitySettings())["metrics"]
    assert figures["repetition"]["2"] == pytest.approx((1 / 2 + 0) / 2)
    assert figures["distinct"]["1"] == 3 / 8
    a, b = np.array([0.6, 0.4]), np.array([1, 1, 1]) / 3
    entropies = [-(p * np.log(p)).sum() for p in (a, b)]
    assert figures["entropy"]["mean"] == pytest.approx(np.mean(entropies))
    assert figures["entropy"]["tokens"] == "of the file"


# MAUVE


def test_mauve_of_histograms_is_the_area_under_the_curve():
    """Against the area on a fine grid of mixtures; and its limits."""
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.ones(6), 2)

    def kl(a, b):
        return float(np.sum(a * np.log(a / b)))

    weights = np.linspace(1e-6, 1 - 1e-6, 20_001)
    curve = [
        (math.exp(-5 * kl(q, r)), math.exp(-5 * kl(p, r)))
        for r in (w * p + (1 - w) * q for w in weights)
    ]
    x, y = np.array([(1, 0), *curve, (0, 1)]).T
    area = sum(
        (x0 - x1) * (y0 + y1) / 2
        for (x0, y0), (x1, y1) in itertools.pairwise(zip(x, y, strict=True))
    )
    assert mauve.of_histograms(p, q) == pytest.approx(area, abs=3e-3)
    assert mauve.of_histograms(p, q) == pytest.approx(mauve.of_histograms(q, p), abs=1e-9)
    assert mauve.of_histograms(p, p) == pytest.approx(1, abs=1e-6)
    assert mauve.of_histograms(np.array([1.0, 0]), np.array([0, 1.0])) < 0.01


def test_mauve_tells_texts_apart(judge):
    def texts(words):
        rng = np.random.default_rng(1)
        return Texts("some", [" ".join(rng.choice(words, 12)) for _ in range(30)])

    sea, land = texts(["gull", "harbour", "boats"]), texts(["42", "?!", "{}"])
    same, other = (mauve.compute(judged(judge, sea, references=r)) for r in (sea, land))
    assert same["mauve"] == pytest.approx(1) and other["mauve"] < 0.8
    assert other["clusters"] == 3 and other["approximate"]


def test_features_are_of_the_last_token(judge):
    """They depend on the whole text, and not on the texts next to it."""
    rows = [[5, 6, 7], [8] * 300, [9]]
    together = judge.features(rows)
    for i, row in enumerate(rows):
        np.testing.assert_allclose(judge.features([row])[0], together[i], rtol=0, atol=1e-5)
    changed = judge.features([[4, 6, 7]])[0]
    assert np.abs(changed - together[0]).max() > 1e-3
    with pytest.raises(UserError, match="text 1: must have a token"):
        judge.features([[1], []])


def test_clusters_of_separate_points_are_found():
    rng = np.random.default_rng(0)
    label = np.repeat([0, 1, 2, 3], 25)
    points = np.array([[0, 0], [9, 0], [0, 9], [9, 9]])[label] + rng.normal(0, 0.3, (100, 2))
    found = kmeans.clusters(points, 4, seed=0)
    assert len({*zip(label.tolist(), found.tolist(), strict=True)}) == 4
    np.testing.assert_array_equal(found, kmeans.clusters(points, 4, seed=0))
    same = kmeans.clusters(np.zeros((5, 2)), 3, seed=0)  # fewer points than clusters
    assert len(set(same.tolist())) == 1


def test_principal_components_keep_distances():
    rng = np.random.default_rng(0)
    flat = rng.normal(size=(50, 2)) @ rng.normal(size=(2, 7))
    reduced = kmeans.principal_components(flat, 1 - 1e-9)
    assert reduced.shape == (50, 2)
    gram = [np.square(a[:, None] - a[None]).sum(axis=-1) for a in (flat, reduced)]
    np.testing.assert_allclose(*gram, atol=1e-9)
    assert kmeans.principal_components(flat, 0.01).shape == (50, 1)


# Texts


def write(tmp_path, *lines):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def test_forms_of_a_line(tmp_path):
    path = write(tmp_path, '{"text": "a", "seed": 1}', '"b"', "", '{"text": "c", "token_ids": [1]}')
    assert text_file.read(path) == Texts(str(path), ["a", "b", "c"])
    path = write(tmp_path, "[1, 2]", json.dumps({"token_ids": [3]}))
    assert text_file.read(path) == Texts(str(path), token_ids=[[1, 2], [3]])


@pytest.mark.parametrize(
    "lines, told",
    [
        ([], "must have at least one text"),
        (["{"], "line 1: not JSON"),
        (['"a"', "7"], "line 2: must be an object with text or token_ids"),
        (['{"texts": "a"}'], "did you mean 'text'"),
        (['{"text": 1}'], "line 1: text: must be a string, not int"),
        (['"a"', "[1]"], "every line must have the field text, or every line token_ids"),
        (["[-1]"], "line 1: token_ids: must be a list of ids"),
        (['"\\ud800"'], "line 1: text: character 0 is a lone surrogate"),
    ],
)
def test_bad_lines(tmp_path, lines, told):
    with pytest.raises(UserError, match=told):
        text_file.read(write(tmp_path, *lines))


def test_texts_that_change_in_the_tokenizer_are_counted(judge):
    """The judge's byte-level tokenizer keeps all texts; EOS is spelled as `sample` does."""
    given = Texts("texts", ["ab", "a[EOS]b", "", "c" * 50])
    found = judged(judge, given, max_length=20)
    assert found.counts == {
        "num_texts": 4, "num_truncated": 1, "num_empty": 1, "num_not_round_trip": 0,
    }  # fmt: skip
    assert found.ids[1][1] == judge.eos_id
    assert "4 texts; 1 cut to 20 tokens; 1 empty" in metrics.table(
        metrics.judge(given, judge, QualitySettings(max_length=20), ["entropy"])
    )


@pytest.mark.parametrize(
    "settings, wanted, told",
    [
        ({"variant": "pool"}, (), "variant='pool': must be one of per_text, pooled, bd3"),
        ({"max_length": 0}, (), "max_length=0: must be positive"),
        ({"clusters": 1}, (), "clusters=1: must be 0 or at least 2"),
        ({}, ("mauv",), "metrics=mauv: .*did you mean 'mauve'"),
        ({}, ("mauve",), "metrics=mauve: must have references"),
        ({"references": TEXTS, "clusters": 99}, ("mauve",), "clusters=99: must be at most 14"),
    ],
)
def test_bad_settings(judge, settings, wanted, told):
    with pytest.raises(UserError, match=told):
        metrics.judge(TEXTS, judge, QualitySettings(**{"max_length": 200} | settings), wanted)


def test_ids_of_another_tokenizer(judge):
    with pytest.raises(UserError, match="ids: token id 300: must be below the judge's 300"):
        metrics.judge(Texts("ids", token_ids=[[1], [300]]), judge, QualitySettings())
