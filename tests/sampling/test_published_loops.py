"""The samples of the public code of LLaDA, Dream and SDAR, token for token, from its own noise."""

import dataclasses
import json
import re

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_models import case, model, read_json, workdir
from thorough import thorough
from tiny_run import command

from esolm_jax.config import default_config
from esolm_jax.errors import UserError
from esolm_jax.evaluation.protocol.multiple_choice import log_softmax
from esolm_jax.family import registry
from esolm_jax.sampling import published_loops
from esolm_jax.sampling.engine.choose import TokenSampler
from esolm_jax.sampling.loops.confidence import Confidence
from esolm_jax.sampling.loops.dream import Dream
from esolm_jax.sampling.loops.llada import LLaDA
from esolm_jax.sampling.loops.loop import Ends, Task, row_keys
from esolm_jax.sampling.loops.sdar import SDAR, Rule
from esolm_jax.sampling.loops.whole_text import WholeText, known_by_position
from esolm_jax.sampling.plan import passes, schedule
from esolm_jax.sampling.plan.canvas import MASK, Canvas, Seed

NEVER = passes.NEVER


@pytest.mark.parametrize(
    ("eos", "never", "late"), [("free", (), ()), ("never", (5,), ()), ("late", (), (5, 7))]
)
def test_ends_of_llada(eos, never, late):
    """`never` is of EOS, `late` of EOS and of EOT, if the tokenizer has one."""
    config = default_config()
    config.objective, config.alpha_0 = "mdlm", 1.0
    config.sample.update({"loop": "llada", "eos": eos})
    rule = published_loops.make_llada(config, None, Ends(5, 7)).rule
    assert (rule.never, rule.late) == (never, late)
    rule = published_loops.make_llada(config, None, Ends(5, None)).rule
    assert (rule.never, rule.late) == (never, late[:1])


# Each compiles a program, so the others run only on demand; SDAR's runs through the verb below.
FEW = {
    "llada_mha": ("temperature_cfg_random",),
    "llada_gqa_tied": ("masks_in_prompt",),
    "dream": ("batch_left_padded_origin", "temperature_top_p_entropy"),
    "dream_tied_bf16": (),
    "sdar": (),
}


def cases(*names):
    return [
        pytest.param(name, key, marks=() if key in FEW[name] else thorough)
        for name in names
        for key, c in read_json(name)["sampling"].items()
        if c.get("golden", True)
    ]


@flax.struct.dataclass
class Recorded:
    """The noise of the public code: [passes, B, W, V] and [passes, B, W]; one may be None."""

    gumbel: jax.Array | None
    uniform: jax.Array | None

    @classmethod
    def of(cls, tokens_u16, places_u16):
        u = [None if k is None else (k + 0.5) / 65536 for k in (tokens_u16, places_u16)]
        gumbel = None if u[0] is None else jnp.asarray(-np.log(-np.log(u[0])), jnp.float32)
        return cls(gumbel, None if u[1] is None else jnp.asarray(np.log(u[1]), jnp.float32))

    def tokens(self, pass_index, position_BW, vocab_size):
        return self.gumbel[pass_index]

    def places(self, pass_index, position_BW):
        return self.uniform[pass_index]


def task(name, rows, eos_id=None, block_length=1):
    """The generation of the masks in these rows of ids, which may differ in length."""
    loaded = model(name)
    rows = [np.where(np.asarray(row) == loaded.mask_id, MASK, row).tolist() for row in rows]
    seeds = [Seed(0, b) for b in range(len(rows))]
    vocab_size = loaded._built.model.vocab_size
    canvas = Canvas.of(rows, seeds, vocab_size=vocab_size, mask_id=loaded.mask_id)
    drawn = schedule.left_to_right(canvas)
    family = registry.get(loaded.config.objective)
    plan = passes.make_plan(family, drawn, mask_id=loaded.mask_id, block_length=block_length)
    return Task(plan, None, row_keys(seeds), eos_id=eos_id)


def unpadded(golden, states):
    """The rows without the padding on their left, which nothing reads."""
    masks = golden.get("attention_mask", np.ones_like(golden["prompt"]))
    padding = (masks == 0).sum(axis=1)
    return [states[..., b, n:] for b, n in enumerate(padding)]


def check_states(name, golden, decoded):
    """The tokens after each step are those of the public code."""
    for b, states in enumerate(unpadded(golden, golden["states"])):
        length = states.shape[-1]
        text, revealed = (np.asarray(a)[b, :length] for a in (decoded.text, decoded.revealed_at))
        for i, state in enumerate(states):
            shown = np.where(revealed < i, text, model(name).mask_id)
            np.testing.assert_array_equal(shown, state, f"row {b} after {i} steps")


def unpadded_noise(golden, noise):
    """[steps, B, L, …] → the same without padding on the left; zeros are added on the right."""
    masks = golden.get("attention_mask", np.ones_like(golden["prompt"]))
    rolled = [np.roll(noise[:, b], -n, axis=1) for b, n in enumerate((masks == 0).sum(axis=1))]
    return np.stack(rolled, axis=1)


# LLaDA.


def llada_rule(c):
    """The published code gives EOT no confidence, and EOS only where the temperature is 0."""
    late = (c["eot_id"],) if c["temperature"] else (c["eos_id"], c["eot_id"])
    return LLaDA(
        steps=c["steps"],
        block_length=c["block_length"],
        order={"low_confidence": "confidence"}.get(c["remasking"], c["remasking"]),
        temperature=c["temperature"],
        guidance=c["cfg_scale"],
        never=(c["eos_id"],) if c["logits_eos_inf"] else (),
        late=late if c["confidence_eos_eot_inf"] else (),
    )


@pytest.mark.parametrize(("name", "key"), cases("llada_mha", "llada_gqa_tied"))
def test_llada(name, key):
    golden, settings = case(name, "sampling", key), read_json(name)["sampling"][key]
    rule = llada_rule(settings)
    recorded = [golden.get(f"{what}_noise_u16") for what in ("token", "position")]
    noise = Recorded.of(*(a if a is None else unpadded_noise(golden, a) for a in recorded))
    loop = WholeText(task(name, unpadded(golden, golden["states"][0])), rule, noise=noise)
    if not settings["masks_left"] and "masks_in_prompt" not in key:
        count = loop.rule.tables(known_by_position(loop.task)[0], loop.task.plan.length)["count"]
        np.testing.assert_array_equal(count.T, golden["transfer_counts"])
    decoded = loop.run(model(name)._network("auto"))
    check_states(name, golden, decoded)
    assert (np.asarray(decoded.revealed_at) == NEVER).sum() >= settings["masks_left"]


# Dream.


def dream_rule(c):
    names = {"maskgit_plus": "confidence", "topk_margin": "margin", "origin": "random"}
    return Dream(
        steps=c["steps"],
        order=names.get(c["alg"], c["alg"]),
        order_temperature=c["alg_temp"] or 0.0,
        temperature=c["temperature"],
        top_p=c["top_p"] or 1.0,
        top_k=c["top_k"] or 0,
        eps=c["eps"],
    )


def dream_noise(golden, c, vocab_size, mask):
    """The arrays in order of use → noise by step and position."""
    states = golden["states"]
    arrays = iter(golden[k] for k in sorted(k for k in golden if k.startswith("noise_u16")))
    steps, shape = len(states) - 1, states.shape[1:]
    tokens = np.zeros((steps, *shape, vocab_size), np.uint16)
    places = np.zeros((steps, *shape), np.uint16)
    for i, (before, after) in enumerate(zip(states, states[1:], strict=False)):
        masked = before == mask
        if c["alg"] == "origin":
            places[i][masked] = next(arrays)
            masked = masked & (after != mask)
        if c["temperature"] and masked.any():
            tokens[i][masked] = next(arrays)
        elif c["temperature"] and c["alg"] == "origin":
            next(arrays)  # of no tokens
        if c["alg_temp"]:
            places[i] = next(arrays)
    assert next(arrays, None) is None
    return Recorded.of(*(unpadded_noise(golden, a) for a in (tokens, places)))


@pytest.mark.parametrize(("name", "key"), cases("dream", "dream_tied_bf16"))
def test_dream(name, key):
    golden, settings = case(name, "sampling", key), read_json(name)["sampling"][key]
    loaded = model(name)
    noise = dream_noise(golden, settings, loaded._built.model.vocab_size, loaded.mask_id)
    rows = unpadded(golden, golden["states"][0])
    loop = WholeText(task(name, rows), dream_rule(settings), predicts_next=True, noise=noise)
    check_states(name, golden, loop.run(loaded._network("auto")))


# SDAR.


def sdar_rule(c):
    kind = c["remasking_strategy"]
    return Rule(
        block_length=c["block_length"],
        steps=c["denoising_steps"],
        order="left_to_right" if kind == "sequential" else "confidence",
        threshold=c["confidence_threshold"] if kind == "low_confidence_dynamic" else 0.0,
        temperature=0.0 if c["greedy"] else c["temperature"],
        top_k=c["top_k"],
        top_p=c["top_p"],
    )


def sdar_noise(golden, c, prompt_passes, vocab_size):
    """One array for each pass that does not only store a block."""
    stores = golden["call_stores_cache"]
    shape = prompt_passes + len(stores), 1, c["block_length"], vocab_size
    tokens = np.zeros(shape, np.uint16)
    arrays = [golden[k] for k in sorted(k for k in golden if k.startswith("noise_u16"))]
    tokens[prompt_passes + np.flatnonzero(~stores), 0] = arrays
    return Recorded.of(tokens, None)


@pytest.mark.parametrize(("name", "key"), cases("sdar"))
def test_sdar(name, key):
    golden, c = case(name, "sampling", key), read_json(name)["sampling"][key]
    loaded = model(name)
    row = np.full(c["length"], loaded.mask_id)
    row[: golden["prompt"].shape[1]] = golden["prompt"]
    eos_id = 290 if c["stopping_criteria_idx"] else None
    of_task = task(name, [row], eos_id, block_length=c["block_length"])
    before, noise = of_task.plan.prompt_passes, None
    if c["noise_arrays"]:
        noise = sdar_noise(golden, c, before, loaded._built.model.vocab_size)
    decoded = SDAR(of_task, sdar_rule(c), noise=noise).run(loaded._network("auto"))
    text, revealed = np.asarray(decoded.text)[0], np.asarray(decoded.revealed_at)[0]
    np.testing.assert_array_equal(text[None], golden["final"])
    assert int(decoded.passes) - before == len(golden["call_block"])
    for i, (block, tokens) in enumerate(
        zip(golden["call_block"], golden["call_tokens"], strict=True)
    ):
        span = slice(block * c["block_length"], (block + 1) * c["block_length"])
        shown = np.where(revealed < before + i, text, loaded.mask_id)[span]
        np.testing.assert_array_equal(shown, tokens, f"pass {i}")


# Through the verb.


@pytest.mark.parametrize(
    ("name", "key", "settings"),
    [
        ("llada_mha", "two_per_step_blocks", ("steps=8", "block_length=8")),
        pytest.param(
            "llada_gqa_tied", "cfg", ("steps=8", "block_length=8", "guidance=1.5"), marks=thorough
        ),
        ("dream", "topk_margin", ("steps=6", "order=margin")),
        ("sdar", "dynamic", ("steps=4", "temperature=0.0", "confidence_threshold=0.4")),
    ],
)
def test_sample(name, key, settings):
    golden = case(name, "sampling", key)
    wanted = golden["final"] if name == "sdar" else golden["states"][-1]
    text = model(name).tokenizer.decode(golden["prompt"][0].tolist())
    flags = [f"--config.sample.{s}" for s in (*settings, f"length={wanted.shape[1]}")]
    one = "--config.sample.num_texts=1", "--config.mesh.devices=1"
    assert command("sample", f"--workdir={workdir(name)}", f"--prompt={text}", *flags, *one) == 0
    row = json.loads((workdir(name) / "samples.jsonl").read_text())
    assert row["token_ids"] == wanted[0].tolist()


@thorough
def test_our_confidence_order_of_dream():
    """By hand: the most confident mask first, predicted by the row before; no mask token."""
    loaded = model("dream")
    prompt = loaded.tokenizer.encode("The river")
    ids = np.array([*prompt, *[loaded.mask_id] * 4])
    of_task = dataclasses.replace(task("dream", [ids]), sampler=TokenSampler(loaded.mask_id, 0.0))
    decoded = Confidence(of_task, cached=False, predicts_next=True).run(loaded._network("auto"))
    for _ in range(4):
        logits = np.array(loaded.logits(ids[None]), np.float64)[
            0, np.maximum(np.arange(len(ids)) - 1, 0)
        ]
        logits[:, loaded.mask_id] = -np.inf
        confidence = log_softmax(logits).max(axis=1)
        position = np.argmax(np.where(ids == loaded.mask_id, confidence, -np.inf))
        ids[position] = logits[position].argmax()
    np.testing.assert_array_equal(np.asarray(decoded.text)[0], ids)


def test_sampled_texts_follow_the_distribution():
    """Of one token: the noise of passes is not that of the other loops, but as exact."""
    loaded = model("llada_mha")
    ids = loaded.tokenizer.encode("The")
    length, rows = len(ids) + 1, 512
    batch = [[*ids, loaded.mask_id]] * rows
    loop = WholeText(task("llada_mha", batch), LLaDA(temperature=1.0))
    decoded = loop.run(loaded._network("auto"))
    counts = np.bincount(np.asarray(decoded.text)[:, -1], minlength=384)
    logits = np.asarray(loaded.logits([[*ids, loaded.mask_id]]), np.float64)[0, length - 1]
    probs = np.exp(logits - logits.max())
    probs /= probs.sum()
    error = (counts / rows - probs) / np.sqrt(probs * (1 - probs) / rows)
    assert np.abs(error[probs > 1e-2]).max() < 4.5


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("llada_mha", {"loop": "sdar"}, "sample.loop='sdar'"),
        ("sdar", {"loop": "llada"}, "sample.loop='llada'"),
        ("dream", {"loop": "plain"}, "predicted by the one before it"),
        ("llada_mha", {"order": "margin"}, "one of confidence, random with sample.loop llada"),
        ("llada_mha", {"top_p": 0.9}, "top_p=0.9: must be 1.0 with sample.loop llada"),
        ("dream", {"guidance": 1.0}, "guidance=1.0: must be 0.0 unless sample.loop is llada"),
        ("llada_mha", {"length": 30, "block_length": 7, "steps": 7}, "a multiple of the 5 blocks"),
    ],
)
def test_what_does_not_fit_is_refused(name, settings, words):
    with pytest.raises(UserError, match=re.escape(words)):
        model(name).sample(**settings)
