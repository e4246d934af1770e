"""Shipped JavaScript computes what Python does: one process of Node answers all questions.

The session of ONNX Runtime is a fake: see support/shipped.mjs.
"""

import functools
import json
import pathlib
import re
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizer_kinds
from tokenizer_kinds import KINDS, LENGTH, tokenizer_of

from esolm_jax.data import known_text
from esolm_jax.interop.export.shipped import schedule_esolm, text_codec
from esolm_jax.process import prng
from esolm_jax.sampling.engine import choose

pytestmark = [
    pytest.mark.fast_compile,
    pytest.mark.skipif(shutil.which("node") is None, reason="needs Node"),
]
SHIPPED = pathlib.Path(text_codec.__file__).parent
PROGRAM = pathlib.Path(__file__).parents[1] / "support" / "shipped.mjs"
TEXTS, IDS, PROMPTS = 150, 150, 40
LONE_SURROGATE = "a\ud800[MASK]"

# How families label tokens, and the deterministic schedules.
FAMILIES = {
    "eso_b": {"cached": True, "shift": 0, "rank_block": 1, "prefix_of_one_rank": False},
    "ar": {"cached": True, "shift": 1, "rank_block": 1, "prefix_of_one_rank": False},
    "eso_a": {"cached": False, "shift": 0, "rank_block": 1, "prefix_of_one_rank": True},
    "bd3": {"cached": False, "shift": 0, "rank_block": 4, "prefix_of_one_rank": False},
    "mdlm": {"cached": False, "shift": 0, "rank_block": 17, "prefix_of_one_rank": False},
}
STRIDED = [("strided", alpha_0, steps) for alpha_0 in (0.0, 0.5, 1.0) for steps in (0, 5, 40)]
ORDERS = {
    name: [("left_to_right", 0.5, 0), *(STRIDED if name in ("eso_b", "eso_a", "mdlm") else [])]
    for name in FAMILIES
}
ROWS, TEXT, VOCAB, MASK_ID, START = 3, 17, 7, 6, 5  # of the fake network
SEED, FIRST_ROW = 11, 2
NARROW = {"temperature": 0.7, "top_k": 5, "top_p": 0.9}


def sampling(family: str, schedule=("left_to_right", 0.5, 0), **fields) -> dict:
    """config.sampling of a fake network."""
    name, alpha_0, steps = schedule
    return {
        **FAMILIES[family],
        "schedule": name,
        "alpha_0": alpha_0,
        "steps": steps,
        "block_length": 4,
        "temperature": 0.0,
        "top_k": 0,
        "top_p": 1.0,
        "length": TEXT,
        "max_length": 64,
        "trained_length": 64,
        "fixed_alpha_0": None,
        "one_token": family == "ar",
        "schedules": ["ancestral", "strided", "left_to_right", "blockwise"],
        "replaced_schedules": {},
        "mask_id": MASK_ID,
        "start_token": START,
        "has_step": family != "mdlm",
        "cache": [1, 1, 1],
        "onnx_cache_dtype": "float32",
        "vocab_size": VOCAB,
        **fields,
    }


def known_rows(family: str) -> np.ndarray:
    """bool [3, L]: nothing is known, a beginning, and for families of any order some tokens."""
    known = np.zeros((ROWS, TEXT), bool)
    known[1, :6] = True
    known[2] = np.random.default_rng(0).random(TEXT) < 0.4
    if family in ("ar", "bd3"):
        known[2] = np.arange(TEXT) < 9
    return known


def given_rows(family: str) -> list[list[int]]:
    token = np.random.default_rng(1).integers(0, MASK_ID, (ROWS, TEXT))
    return np.where(known_rows(family), token, -1).tolist()


# Questions.


def codec_questions() -> list[dict]:
    asked = []
    for kind in KINDS:
        tokenizer = tokenizer_of(kind)
        specials = [tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.mask_id]
        num_ids = max(tokenizer.vocab_size, tokenizer.mask_id + 1)
        prompts = [*tokenizer_kinds.masked_texts(PROMPTS), LONE_SURROGATE]
        asked.append(
            {
                "vocabulary": tokenizer_kinds.vocabulary_of(kind),
                "texts": tokenizer_kinds.texts(TEXTS),
                "ids": [*tokenizer_kinds.random_ids(num_ids, specials, IDS), ([num_ids], True)],
                "prompts": [(text, LENGTH) for text in prompts],
            }
        )
    return asked


def schedule_questions() -> list[dict]:
    """The last two are refused."""
    asked = [
        {"s": sampling(family, order), "known": known_rows(family).tolist()}
        for family, orders in ORDERS.items()
        for order in orders
    ]
    scattered = known_rows("eso_b").tolist()
    asked += [{"s": sampling(family), "known": scattered} for family in ("ar", "bd3")]
    return [one | {"seed": SEED} for one in asked]


def loop_questions() -> list[dict]:
    common = {"seed": SEED, "firstRow": FIRST_ROW}
    return [
        {"sampling": sampling(family, orders[-1]), "settings": settings, **common}
        | {"rows": given_rows(family)}
        for family, orders in ORDERS.items()
        for settings in ({}, NARROW)
    ]


FILTERS = [
    {"mask_id": 2, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    for temperature, top_k, top_p in [(1.0, 0, 1.0), (0.5, 3, 1.0), (2.0, 0, 0.7), (1e-4, 9, 0.5)]
]
LOGITS = np.random.default_rng(3).normal(0, 4, (4, 50)).astype(np.float32)
LOGITS[:, 7] = LOGITS[:, 8]  # a tie
LOGITS[:, 2] = -np.inf  # the mask
KEYS = [([0, 11], 3), ([0xFFFFFFFF, 0x80000001], 0xFFFFFFFE)]
DEFAULTS = sampling("eso_b") | {"schedules": ["ancestral", "left_to_right"]}
CHECKED = [
    (DEFAULTS, {"steps": 3, "schedule": "ancestral"}, 9),
    (DEFAULTS | {"trained_length": 8}, {"schedule": "ancestral"}, 9),
    (DEFAULTS | {"replaced_schedules": {"ancestral": "left_to_right"}}, {"steps": 2}, None),
    (DEFAULTS, {"schedule": "strided"}, None),
    (DEFAULTS, {"alpha_0": 1.5}, None),
    (DEFAULTS | {"fixed_alpha_0": 1.0}, {"alpha_0": 0.5}, None),
    (DEFAULTS | {"one_token": True}, {"steps": 4}, None),
    (DEFAULTS, {}, 65),
    (DEFAULTS, {"width": 1}, None),
]
RANDOM = {"seed": 5, "rows": 2000, "length": 6, "alpha_0": 0.3, "trials": 20, "p": 0.8}


@pytest.fixture(scope="module")
def answers():
    """The answers of one process."""
    asked = {
        "codecs": codec_questions(),
        "schedules": schedule_questions(),
        "loops": loop_questions(),
        "keys": KEYS,
        "gumbel": [(key, 40) for key, _ in KEYS],
        "filtered": [(s, row) for s in FILTERS for row in np.maximum(LOGITS, -1e38).tolist()],
        "checked": CHECKED,
        "random": RANDOM,
        "options": [["a", "--steps=8", "--top_p", "0.5", "--ids"], ["--steps=1.5"], ["--top_k="]],
    }
    run = [shutil.which("node"), str(PROGRAM), str(SHIPPED)]
    out = subprocess.run(run, input=json.dumps(asked).encode(), check=True, stdout=subprocess.PIPE)
    return json.loads(out.stdout)


# Texts.


@pytest.mark.parametrize("kind", KINDS)
def test_codec(answers, kind):
    index = list(KINDS).index(kind)
    asked, found = codec_questions()[index], answers["codecs"][index]
    codec = without_library(asked["vocabulary"])

    def tried(make):
        try:
            return make()
        except known_text.NotKept as error:
            return error.at
        except ValueError:
            return "error"

    def plain(result):
        return "error" if isinstance(result, dict) else result

    wanted = [tried(lambda a=a: codec.encode(a[0], begins=a[1])) for a in asked["texts"]]
    assert list(map(plain, found["encoded"])) == wanted
    wanted = [tried(lambda a=a: codec.decode(a[0], bos_is_given=a[1])) for a in asked["ids"]]
    assert list(map(plain, found["decoded"])) == wanted
    wanted = [tried(lambda a=a: text_codec.parse_prompt(codec, *a)) for a in asked["prompts"]]
    assert list(map(plain, found["rows"])) == wanted
    assert any(isinstance(row, list) for row in wanted) and wanted[-1] == "error"


def without_library(vocabulary: dict) -> text_codec.Codec:
    """A codec of Python that spells with the fewest tokens, as in JavaScript."""
    if vocabulary["library"] is not None:
        missing = {"package": "no_such_package", "file": ""}
        vocabulary = vocabulary | {"library": missing}
    return text_codec.Codec(vocabulary)


@pytest.mark.parametrize(
    ("n", "part"),
    [(3, "has 43 tokens or more: must have at most 40"), (5, '"[MASK:x]": must be [MASK]')],
)
def test_messages_of_prompts(answers, n, part):
    assert part in answers["codecs"][0]["rows"][n]["error"]


# Schedules and draws.


def test_schedules_without_draws_are_those_of_python(answers):
    assert answers["unread"] == schedule_esolm.UNREAD
    refused = []
    for asked, found in zip(schedule_questions(), answers["schedules"], strict=True):
        passes = schedule_esolm.plan_passes(asked["s"], np.array(asked["known"]), asked["seed"])
        np.testing.assert_array_equal(found["order"], passes.order)
        for name in ("start", "first", "size", "end", "below"):
            columns = np.array([columns[name] for columns in found["passes"]])
            np.testing.assert_array_equal(columns, getattr(passes, name), err_msg=name)
        try:
            schedule_esolm.check_passes(asked["s"], passes)
        except ValueError as error:
            reason = str(error).split(": ")[1]
            assert found["refused"]["error"] == f"the prompt: {reason}"
        refused.append(found["refused"] is not None)
    assert refused[-2:] == [True, True] and not any(refused[:-2])


def test_random_orders_have_their_distribution(answers):
    """Of 2,000 rows: which position comes first, and how many come in random order."""
    order = np.array(answers["random"]["orders"])
    rows, length = order.shape
    assert (np.sort(order, axis=1) == np.arange(length)).all()
    falls = np.diff(order, axis=1) < 0
    # P(first = i): uniform with a diffusion phase (1 − 0.7⁶), else 0.
    share = np.bincount(order[:, 0], minlength=length) / rows
    diffusion = 1 - 0.7**length
    wanted = np.full(length, diffusion / length) + (1 - diffusion) * (np.arange(length) == 0)
    np.testing.assert_allclose(share, wanted, atol=0.04)
    assert 0.15 < falls.mean() < 0.45
    drawn = np.array(answers["random"]["binomial"])
    n, p = RANDOM["trials"], RANDOM["p"]
    assert abs(drawn.mean() - n * p) < 0.15 and abs(drawn.var() - n * p * (1 - p)) < 0.5
    assert drawn.min() >= 0 and drawn.max() <= n


def test_keys_and_noise_are_those_of_jax(answers):
    keys = prng.wrap(jnp.array([key for key, _ in KEYS], jnp.uint32))
    folded = [jax.random.fold_in(key, n) for key, (_, n) in zip(keys, KEYS, strict=True)]
    assert answers["keys"] == [jax.random.key_data(key).tolist() for key in folded]
    wanted = choose.gumbel(keys[None], 40)[0]
    np.testing.assert_allclose(answers["gumbel"], wanted, rtol=1e-5, atol=1e-6)


def test_filtered_logits_are_those_of_sample(answers):
    rows = len(LOGITS)
    for n, s in enumerate(FILTERS):
        found = np.array(answers["filtered"][rows * n :][:rows], np.float64)  # null becomes nan
        found[:, s["mask_id"]] = np.nan
        wanted = np.asarray(choose.TokenSampler(**s).log_probs(LOGITS[None]))[0]
        kept = np.isfinite(wanted)
        np.testing.assert_array_equal(~np.isnan(found), kept)
        found -= np.nanmax(found, axis=1, keepdims=True)
        log_probs = found - np.log(np.nansum(np.exp(found), axis=1, keepdims=True))
        np.testing.assert_allclose(log_probs[kept], wanted[kept], rtol=1e-5, atol=1e-5)


def test_settings_are_checked_as_in_python(answers):
    for (defaults, settings, length), found in zip(CHECKED, answers["checked"], strict=True):
        try:
            wanted = schedule_esolm.checked(defaults, settings, length)
        except ValueError as error:
            name = re.split("[=:]", str(error))[0]
            assert re.split("[=:]", found["error"])[0] == name
        else:
            assert found == wanted


def test_options(answers):
    given, not_whole, empty = answers["options"]
    assert given == {
        "num_texts": 1, "seed": 0, "ids": True, "steps": 8, "top_p": 0.5, "prompts": ["a"],
    }  # fmt: skip
    assert not_whole["error"] == "--steps=1.5: must be an integer of at least 0"
    assert empty["error"] == "--top_k=: must be an integer of at least 0"


# The loop.


def logits_of(total: int) -> np.ndarray:
    v = np.arange(VOCAB)
    return ((total * (v + 3) + v * v) % 31 / 4).astype(np.float32)


@functools.partial(jax.jit, static_argnums=0)
def draw(sampler: choose.TokenSampler, logits, noise):
    return sampler(logits[None, None], None, noise[None, None])[0, 0]


def expected_texts(asked: dict, noise: np.ndarray) -> list[list[int]]:
    """The loop without a cache: in each pass, all slots are computed again."""
    s = schedule_esolm.checked(asked["sampling"], asked["settings"], TEXT)
    rows = np.array(asked["rows"])
    passes = schedule_esolm.plan_passes(s, rows >= 0, SEED)
    sampler = choose.TokenSampler(MASK_ID, s["temperature"], s["top_p"], s["top_k"])
    shift, text = s["shift"], np.where(rows >= 0, rows, MASK_ID)
    for row, order in enumerate(passes.order):
        columns = (passes.first, passes.size, passes.end, passes.below)
        for first, size, end, below in np.stack(columns, axis=-1)[:, row].tolist():
            slot = np.arange(end)
            token = np.concatenate([[START] * shift, text[row, order]])[:end]
            layer = np.where(slot < first + shift, token, MASK_ID) * (order[:end] + 1)
            rank = np.where(slot < below, 0, slot // s["rank_block"])
            is_seen = rank[None] <= rank[:, None]
            for _ in range(2):
                layer = is_seen @ layer % 1009
            for at in range(first, first + size):
                position = order[at]
                chosen = draw(sampler, logits_of(int(layer[at])), noise[row, position])
                text[row, position] = chosen
    return text.tolist()


def test_loop_generates_what_the_plan_says(answers):
    keys = jax.vmap(jax.random.fold_in, (None, 0))(
        prng.key(SEED), jnp.arange(FIRST_ROW, FIRST_ROW + ROWS)
    )
    position = jnp.tile(jnp.arange(TEXT), (ROWS, 1))
    noise = np.asarray(choose.gumbel(choose.keys_of(keys, position), VOCAB))
    texts = set()
    for asked, found in zip(loop_questions(), answers["loops"], strict=True):
        assert found == expected_texts(asked, noise), asked["sampling"]
        texts.add(json.dumps(found))
    assert len(texts) > 5
