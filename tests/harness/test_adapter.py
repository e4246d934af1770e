"""lm-evaluation-harness with a tiny model: against brute force, and independent of the batch.

Needs the package lm_eval (pip install -e '.[lm-eval]')."""

import json
import types

import golden_models
import numpy as np
import processes
import pytest
import tiny_run
from thorough import thorough

import esolm_jax
from esolm_jax.errors import UserError
from esolm_jax.evaluation.protocol import multiple_choice as mc
from esolm_jax.family.noise import EPS

lm_eval = pytest.importorskip("lm_eval")
from esolm_jax.harness import protocols  # noqa: E402
from esolm_jax.harness.adapter import EsolmLM  # noqa: E402

pytestmark = pytest.mark.fast_compile
ITEMS = [
    ("to be", [" or not", " is", " question"], 0),
    ("nobler", [" in", " mind suff"], 1),
    ("the ", ["slings", "q"], 0),
]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return train(tmp_path_factory.mktemp("eso_b"), "eso_b")


def train(folder, objective):
    data = tiny_run.write_data(folder, **{"data.packing": "pad", "objective": objective})
    fields = data | {"train.steps": 2, "train.eval_windows": 4}
    tiny_run.train(tiny_run.make_config(fields), folder / "run")
    return folder / "run"


def requests(*args):
    return [types.SimpleNamespace(args=arg) for arg in args]


def pairs():
    return requests(*((context, choice) for context, choices, _ in ITEMS for choice in choices))


def brute(model, context: str, answer: str) -> tuple[float, bool]:
    """One pass per token: the known text, then masks to the end of the answer."""
    prompt, ids = mc.encode_pair(model.tokenizer.encode, context, answer)
    total, greedy = 0.0, True
    for at, target in enumerate(ids):
        row = np.array([[*prompt, *ids[:at], *[model.mask_id] * (len(ids) - at)]])
        log_p = np.array(model.logits(row), np.float64)[0, len(prompt) + at]
        log_p[model.mask_id] = -np.inf
        log_p -= np.log(np.exp(log_p).sum())
        total += log_p[target]
        greedy &= int(log_p.argmax()) == target
    return total, greedy


def test_scores_equal_brute_force_and_do_not_depend_on_the_batch(workdir):
    model = esolm_jax.load(workdir)
    found = EsolmLM(workdir, batch_size=3).loglikelihood(pairs())
    for request, (value, greedy) in zip(pairs(), found, strict=True):
        want, is_greedy = brute(model, *request.args)
        assert value == pytest.approx(want, abs=2e-5) and greedy == is_greedy
    for size in (1, 64):
        again = EsolmLM(workdir, batch_size=size).loglikelihood(pairs()[::-1])[::-1]
        np.testing.assert_allclose(again, found, rtol=0, atol=1e-5)


def local_task(folder, **fields) -> dict:
    """The task of docs/harness.md, of ITEMS."""
    file = folder / "items.jsonl"
    rows = [{"q": q, "choices": choices, "gold": gold} for q, choices, gold in ITEMS]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "task": "local_choice",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    } | fields


def test_simple_evaluate_on_a_local_task(workdir, tmp_path):
    """Accuracy is that of the brute-force scores."""
    lm, task = EsolmLM(workdir), local_task(tmp_path)
    results = lm_eval.simple_evaluate(model=lm, tasks=[task], bootstrap_iters=0)["results"]
    model = esolm_jax.load(workdir)
    best = [
        int(np.argmax([brute(model, q, choice)[0] for choice in choices]))
        for q, choices, _ in ITEMS
    ]
    want = np.mean([b == gold for b, (_, _, gold) in zip(best, ITEMS, strict=True)])
    assert results["local_choice"]["acc,none"] == pytest.approx(want)


def test_chat_template(tmp_path):
    """Examples become turns; special tokens that the template spells become these tokens."""
    lm = EsolmLM(golden_models.workdir("llada_mha"))
    task = local_task(tmp_path, fewshot_split="test", fewshot_config={"sampler": "first_n"})
    found = lm_eval.simple_evaluate(
        model=lm,
        tasks=[task],
        num_fewshot=1,
        apply_chat_template=True,
        fewshot_as_multiturn=True,
        bootstrap_iters=0,
    )
    ((prompt, choice), *_) = found["samples"]["local_choice"][1]["arguments"]
    turns = ("user", "to be"), ("assistant", " or not"), ("user", "nobler")
    chat = [{"role": role, "content": content} for role, content in turns]
    assert choice == " in" and prompt == lm.apply_chat_template(chat)
    ids = lm._pair(prompt, choice).ids
    id_of = lm.model.tokenizer.recognizing().token_to_id
    assert ids[0] == id_of("<|startoftext|>") and ids.count(id_of("<|eot_id|>")) == 3
    assert lm.chat_template(True) == lm._chat.source() and lm._chat.end_of_turn() == "<|eot_id|>"
    until = {"until": [], "max_gen_toks": 4}
    (text,) = lm.generate_until(requests((prompt, until)))
    assert "<|eot_id|>" not in text


def test_a_model_without_a_chat_template(workdir):
    lm = EsolmLM(workdir)
    for call in (lambda: lm.chat_template(True), lambda: lm.apply_chat_template([])):
        with pytest.raises(UserError, match="apply_chat_template: must be off, because"):
            call()


def test_empty_contexts_and_rolling(workdir):
    """A text of one window is scored as an answer without a prompt; longer ones in windows."""
    lm = EsolmLM(workdir, batch_size=2)
    short, long = "to be", "to be or not that is the question"
    ((alone, _),) = lm.loglikelihood(requests(("", short)))
    rolling = lm.loglikelihood_rolling(requests((short,), (long,), ("",)))
    assert rolling[0] == pytest.approx(alone, abs=1e-5) and rolling[2] == 0
    ids = lm.model.tokenizer.encode(long)
    first, second, last = (
        lm.loglikelihood(requests((long[:start], long[start:end])))[0][0]
        for start, end in ((0, 16), (15, 16), (0, 0))
    )
    assert len(ids) == 33 and last == 0 and rolling[1] < first + min(second, 0)


def test_long_prompts_lose_their_beginning(workdir):
    lm = EsolmLM(workdir)
    long, short = lm.loglikelihood(requests(("x" * 40 + "to be or", " not"), ("to be or", " not")))
    assert long != short
    cut = lm.loglikelihood(requests(("x" * 4 + "to be or", " not")))[0]
    assert long[0] == pytest.approx(cut[0], abs=1e-5)
    with pytest.raises(UserError, match="an answer has 40 tokens; must have at most 16"):
        lm.loglikelihood(requests(("a", "x" * 40)))


def test_generate_until(workdir):
    """Greedy text is that of `sample`, up to a stop string."""
    lm = EsolmLM(workdir)
    settings = {"until": [], "max_gen_toks": 8}
    (text,) = lm.generate_until(requests(("to be", settings)))
    model = esolm_jax.load(workdir)
    (want,) = model.sample(
        "to be", num_texts=1, length=13, schedule="left_to_right", temperature=0.0
    )
    assert want.split("[EOS]")[0] == "to be" + text
    if text:
        (cut,) = lm.generate_until(requests(("to be", settings | {"until": [text[-1]]})))
        assert cut == text[: text.index(text[-1])]
    drawn = settings | {"do_sample": True, "temperature": 5.0}
    first, again = (lm.generate_until(requests(("to be", drawn))) for _ in "12")
    assert first == again


@thorough
@pytest.mark.parametrize("settings", [{}, {"protocol": "llada", "draws": 32}])
def test_two_processes_find_the_results_of_one(workdir, settings):
    settings |= {"batch_size": 4, "mesh.devices": 0}
    given = [request.args for request in pairs()], ("to be", {"until": [], "max_gen_toks": 8})
    script = f"""
    def body(index):
        import json, types
        from esolm_jax.harness.adapter import EsolmLM
        lm = EsolmLM({str(workdir)!r}, **{settings!r})
        scored, continued = {given!r}
        of = lambda args: types.SimpleNamespace(args=args)
        found = lm.loglikelihood([of(args) for args in scored]), lm.generate_until([of(continued)])
        print(json.dumps(found))
        lm.loglikelihood([of(scored[index])])
    main(body)
    """
    lm = EsolmLM(workdir, **settings)
    want = [*lm.loglikelihood(pairs()), *lm.generate_until(requests(given[1]))]
    for code, out, err in processes.Processes(script).wait():
        assert code == 2 and "error: requests differs between hosts" in err
        scores, texts = json.loads(out.splitlines()[-1])
        np.testing.assert_allclose(scores, want[:-1], rtol=1e-6)
        assert texts == want[-1:]


@pytest.mark.parametrize("protocol", ["llada", "duo_full"])
def test_monte_carlo_protocols(workdir, protocol):
    """The published sums over the same masks; independent of the batch."""
    found = EsolmLM(workdir, protocol=protocol, draws=64, batch_size=5).loglikelihood(pairs())
    other = EsolmLM(workdir, protocol=protocol, draws=64, batch_size=64).loglikelihood(
        pairs()[::-1]
    )
    np.testing.assert_allclose(found, other[::-1], rtol=1e-5)
    assert all(value < 0 for value, _ in found)


@pytest.mark.parametrize("protocol", protocols.MONTE_CARLO)
def test_monte_carlo_scores_are_the_published_sums(workdir, protocol):
    """Over the same masks, from logits of one pass after the other; eso_b excludes the mask."""
    lm = EsolmLM(workdir, protocol=protocol, draws=64)
    run, pair, model = lm._monte_carlo, lm._pair("to be", " or"), lm.model
    sizes = len(pair.prompt), len(pair.answer), 64

    def logits_of(ids):
        hidden = (ids == model.mask_id).any(axis=1)  # eso_b needs a mask
        found = np.zeros((*ids.shape, model.mask_id + 1))
        found[hidden] = np.array(model.logits(ids[hidden]), np.float64)
        found[..., model.mask_id] = -np.inf
        return found

    if protocol == "llada":
        masks = mc.draw_masks(run.rng(pair), sizes[1], 64, protocols.STRATIFIED)
        args = logits_of, pair.prompt, pair.answer, masks
        want = mc.llada_score(*args, mask_id=model.mask_id)
    else:
        sentence = [model.tokenizer.bos_id, *pair.ids, model.tokenizer.eos_id]
        rng = run.rng(pair)
        t = EPS + (1 - EPS) * ((rng.random() + np.arange(64)) / 64)
        masks = rng.random((64, len(sentence))) < (1 - EPS) * t[:, None]
        if protocol == "duo_full":
            want = mc.duo_full_score(logits_of, sentence, masks, t, mask_id=model.mask_id)
        else:
            prefix = 1 + sizes[0]
            common = {"prefix": prefix, "mask_id": model.mask_id}
            want = mc.duo_suffix_score(logits_of, sentence, masks, **common)
    ((score, _),) = lm.loglikelihood(requests(("to be", " or")))
    assert score == pytest.approx(want, rel=1e-5, nan_ok=True)
    assert protocol == "duo_suffix" or not np.isnan(score)


@pytest.mark.parametrize(
    "settings, told",
    [
        ({"protocol": "lada"}, "protocol=lada: must be one of exact, llada.*did you mean 'llada'"),
        ({"batch_size": "auto"}, "batch_size=auto: must be a number"),
        ({"num_orders": -1}, "num_orders=-1"),
        ({"draw": 1}, "draw: unknown argument .did you mean 'draws'"),
        ({"num_orders": 2, "protocol": "llada"}, "num_orders=2: must be 0 with protocol=llada"),
        ({"step": 99}, "99"),
    ],
)
def test_bad_arguments(workdir, settings, told):
    with pytest.raises(UserError, match=told):
        EsolmLM(workdir, **settings)


def test_max_gen_toks_that_do_not_fit(workdir):
    with pytest.raises(UserError, match="max_gen_toks=16: must be in"):
        EsolmLM(workdir).generate_until(requests(("a", {"until": [], "max_gen_toks": 16})))
