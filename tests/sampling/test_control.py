"""Prompts, infilling, edits, lengths, ends and orders: exact, and each row for itself."""

import dataclasses
import re
import types

import jax
import jax.numpy as jnp
import loops
import numpy as np
import pytest
import toy
from jax.sharding import Mesh
from thorough import thorough

from esolm_jax.errors import UserError
from esolm_jax.family import eso_b, mdlm
from esolm_jax.parallel.sharding import AXES
from esolm_jax.sampling.engine import network
from esolm_jax.sampling.engine.choose import TokenSampler
from esolm_jax.sampling.generate import Generator, make_schedule
from esolm_jax.sampling.loops.confidence import STEP, _most_confident
from esolm_jax.sampling.loops.loop import Task, row_keys
from esolm_jax.sampling.loops.plain import Plain
from esolm_jax.sampling.plan import passes, schedule
from esolm_jax.sampling.plan.canvas import MASK, Canvas, Seed

pytestmark = pytest.mark.fast_compile

NETWORK = network.fold(toy.CONFIG, toy.PARAMS)
CHOICE, GREEDY = TokenSampler(toy.MASK), TokenSampler(toy.MASK, temperature=0)
L = toy.LENGTH
MANY = 20_000


def canvas_of(rows, seeds=None) -> Canvas:
    seeds = seeds or [Seed(0, b) for b in range(len(rows))]
    return Canvas.of(rows, seeds, vocab_size=4, mask_id=toy.MASK)


def run(objective, drawn, seeds, choice=CHOICE, **kwargs):
    config = toy.config(objective, 0.5, drawn.order.shape[1])
    plan = passes.plan(config, drawn, mask_id=toy.MASK, start_token=toy.START)
    return loops.decode(NETWORK, plan, choice, row_keys(seeds), **kwargs)


# What is known, and what follows from it.


@pytest.mark.parametrize(
    ("objective", "known", "orders"),
    [
        ("ar", {0: 2, 1: 3}, [(0, 1, 2, 3)]),
        ("mdlm", {2: 0}, [(2, 0, 1, 3), (2, 0, 3, 1), (2, 1, 0, 3), (2, 1, 3, 0), (2, 3, 0, 1),
                          (2, 3, 1, 0)]),
        ("bd3", {0: 3}, [(0, 1, 2, 3), (0, 1, 3, 2)]),
        ("bd3", {0: 3, 1: 0, 2: 2}, [(0, 1, 2, 3)]),
        ("eso_b", {1: 2, 3: 0}, [(1, 3, 0, 2), (1, 3, 2, 0)]),
        ("eso_b", {3: 2}, [(3, *rest) for rest in [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0),
                                                   (2, 0, 1), (2, 1, 0)]]),
    ],
)  # fmt: skip
def test_what_is_generated_follows_the_exact_conditional(objective, known, orders):
    canvas = canvas_of([[known.get(i, MASK) for i in range(L)]] * MANY)
    match objective:
        case "ar":
            drawn = schedule.left_to_right(canvas)
        case "bd3":
            drawn = schedule.blockwise(canvas, toy.BLOCK, 1.0, 0)
        case _:
            drawn = schedule.ancestral(canvas, 1.0, 0)
    found = run(objective, drawn, canvas.seeds)
    places = list(known)
    among = toy.TEXTS[(toy.TEXTS[:, places] == list(known.values())).all(axis=1)]
    log_p = toy.text_log_p(objective, among, orders, num_diffusion=0, given=len(known))
    assert toy.p_of_texts(found.text, log_p, among) > 1e-3
    revealed = np.asarray(found.revealed_at)
    assert (revealed[:, places] == -1).all()
    assert (np.delete(revealed, places, axis=1) >= 0).all()


def test_known_tokens_of_eso_a_read_each_other():
    canvas = canvas_of([[MASK, 2, MASK, 3]] * MANY)
    drawn = schedule.left_to_right(canvas)
    found = run("eso_a", drawn, canvas.seeds)
    among = toy.TEXTS[(toy.TEXTS[:, 1] == 2) & (toy.TEXTS[:, 3] == 3)]
    log_p = toy.text_log_p("eso_a", among, [(1, 3, 0, 2)], num_diffusion=2, given=2)
    assert toy.p_of_texts(found.text, log_p, among) > 1e-3


LENGTH = 300  # a prompt of more than one part, a cache of more than one chunk


def test_a_long_prompt_is_read_as_one_pass_would():
    """Greedy: continuing a text from any place gives the text."""
    whole = canvas_of([[MASK] * LENGTH])
    text = np.asarray(run("eso_b", schedule.left_to_right(whole), whole.seeds, GREEDY).text)
    rows = [text[0, :n].tolist() + [MASK] * (LENGTH - n) for n in (0, 1, 255, 256, 290)]
    canvas = canvas_of(rows)
    again = run("eso_b", schedule.left_to_right(canvas), canvas.seeds, GREEDY)
    np.testing.assert_array_equal(again.text, np.tile(text, (len(rows), 1)))


def test_a_prompt_is_not_cut_inside_a_block_of_bd3(monkeypatch):
    """Its tokens read each other."""
    canvas = canvas_of([[(0, 2, 3)[b % 3] for b in range(10)] + [MASK] * 2])
    drawn = schedule.left_to_right(canvas)
    whole = run("bd3", drawn, canvas.seeds, GREEDY, with_logits=True)
    monkeypatch.setattr(passes, "PROMPT_WINDOWS", ((12, 2 * toy.BLOCK + 1),))
    cut = run("bd3", drawn, canvas.seeds, GREEDY, with_logits=True)
    assert int(cut.passes) > int(whole.passes)
    np.testing.assert_allclose(cut.logits[:, 10:], whole.logits[:, 10:], atol=1e-5)


def test_an_edit_of_one_text_leaves_the_others_whole():
    canvas = canvas_of([[MASK] * 12] * 2)
    text = np.asarray(run("eso_b", schedule.ancestral(canvas, 0.5, 0), canvas.seeds).text)
    edit = canvas.with_all_known(text).remask(0, 3, 6)
    for steps in (0, 2):
        new = np.asarray(run("eso_b", schedule.ancestral(edit, 0.5, steps), edit.seeds).text)
        np.testing.assert_array_equal(new[edit.known], text[edit.known])
    ended = canvas.with_all_known(text, np.array([4, 100]))
    assert ended.length.tolist() == [4, 12] and ended.num_known.tolist() == [4, 12]


def test_an_edit_keeps_the_rest_and_depends_on_all_of_it():
    canvas = canvas_of([[MASK] * 12] * 2)
    text = np.asarray(run("eso_b", schedule.ancestral(canvas, 0.5, 0), canvas.seeds).text)
    edit = canvas.with_all_known(text).remask(0, 3, 6).remask(0, 9, 10).remask(1, 0, 2)
    drawn = schedule.ancestral(edit, 0.5, 0)
    assert (np.sort(drawn.order[0, 8:]) == [3, 4, 5, 9]).all()
    new = np.asarray(run("eso_b", drawn, edit.seeds, GREEDY).text)
    kept = edit.known
    np.testing.assert_array_equal(new[kept], text[kept])
    # As if the rest had been a prompt from the beginning: nothing stale was read.
    rows = np.where(kept, text, MASK).tolist()
    fresh = canvas_of(rows)
    same = run("eso_b", schedule.ancestral(fresh, 0.5, 0), fresh.seeds, GREEDY)
    np.testing.assert_array_equal(same.text, new)
    with pytest.raises(UserError, match="span 3:3"):
        canvas.remask(0, 3, 3)


def test_rows_of_other_prompts_and_lengths_do_not_matter():
    rows = [[MASK] * 12, [0, MASK, 3, *[MASK] * 5], [2, 2, 0, 3, MASK]]
    seeds = [Seed(0, 0), Seed(7, 0), Seed(0, 2)]
    for steps in (0, 3):
        whole = canvas_of(rows, seeds)
        together = np.asarray(run("eso_b", schedule.ancestral(whole, 0.7, steps), seeds).text)
        for row, seed, text in list(zip(rows, seeds, together, strict=True))[1:]:
            one = canvas_of([row], [seed])
            alone = run("eso_b", schedule.ancestral(one, 0.7, steps), [seed]).text
            np.testing.assert_array_equal(np.asarray(alone)[0], text[: len(row)])


# Ends, and beyond the canvas.


@pytest.mark.parametrize("objective", ["ar", "eso_b"])
def test_a_text_ends_at_its_first_eos_and_the_loop_with_the_last_text(objective):
    eos, length = 3, 64
    canvas = canvas_of([[MASK] * length] * 8)
    drawn = schedule.left_to_right(canvas)
    whole = np.asarray(run(objective, drawn, canvas.seeds).text)
    ended = run(objective, drawn, canvas.seeds, eos_id=eos)
    first = np.argmax(whole == eos, axis=1)
    assert (whole == eos).any(axis=1).all()
    np.testing.assert_array_equal(ended.eos_position, first)
    for row, end in enumerate(first):
        np.testing.assert_array_equal(np.asarray(ended.text)[row, :end], whole[row, :end])
    assert int(ended.passes) == first.max() + 1 < length


def test_an_eos_of_the_diffusion_phase_ends_a_text_once_all_before_it_is_known():
    canvas = canvas_of([[MASK] * 32] * 8)
    drawn = schedule.ancestral(canvas, 0.5, 0)
    ended = run("eso_b", drawn, canvas.seeds, eos_id=3)
    whole = np.asarray(run("eso_b", drawn, canvas.seeds).text)
    revealed, end = np.asarray(ended.revealed_at), np.asarray(ended.eos_position)
    for row in range(8):
        assert (revealed[row, : end[row]] < int(ended.passes)).all()
        np.testing.assert_array_equal(
            np.asarray(ended.text)[row, : end[row]], whole[row, : end[row]]
        )


@pytest.mark.parametrize("draft_tokens", [0, 3])
def test_an_eos_before_what_is_known_ends_nothing(draft_tokens):
    """It would take known text with it."""
    eos, row = 3, [MASK] * 10 + [2, 0] + [MASK] * 20
    canvas = canvas_of([row] * 8)
    plan = passes.plan(
        toy.config("eso_b", 0.5, len(row)), schedule.ancestral(canvas, 0.5, 0),
        mask_id=toy.MASK, start_token=toy.START,
    )  # fmt: skip
    args = NETWORK, plan, CHOICE, row_keys(canvas.seeds)
    if draft_tokens:
        ended, _ = loops.speculate(*args, k=draft_tokens, eos_id=eos)
        whole, _ = loops.speculate(*args, k=draft_tokens)
    else:
        ended, whole = loops.decode(*args, eos_id=eos), loops.decode(*args)
    text, end = np.asarray(whole.text), np.asarray(ended.eos_position)
    assert (text[:, :10] == eos).any(axis=1).sum() > 4
    is_end = (text == eos) & (np.arange(len(row)) > 11)
    wanted = np.where(is_end.any(axis=1), is_end.argmax(axis=1), passes.NEVER)
    np.testing.assert_array_equal(end, wanted)
    for found, want, stop in zip(np.asarray(ended.text), text, end, strict=True):
        np.testing.assert_array_equal(found[:stop], want[:stop])


def test_beyond_the_trained_length_block_follows_block():
    config = toy.config("eso_b", 0.5, 8)
    config.sample.length = 20
    canvas = Canvas.empty(3, 20)
    drawn = make_schedule(config, canvas)
    drawn.check()
    np.testing.assert_array_equal(np.sort(drawn.order[:, :8]), np.tile(np.arange(8), (3, 1)))
    np.testing.assert_array_equal(np.sort(drawn.order[:, 8:16]), np.tile(np.arange(8, 16), (3, 1)))
    generator = Generator.of(config, canvas, toy.SPECIAL)
    text = np.asarray(generator.run(NETWORK).text)
    short = Generator.of(config, Canvas.empty(3, 8), toy.SPECIAL)
    np.testing.assert_array_equal(np.asarray(short.run(NETWORK).text), text[:, :8])


# Confidence.


@pytest.mark.parametrize(
    ("objective", "most", "threshold"),
    [("eso_b", 1, 0.0), ("eso_b", 12, 0.6), ("mdlm", 3, 0.0), ("mdlm", 12, 0.6)],
)
def test_the_most_certain_come_first(objective, most, threshold):
    # Masks alone are all equally certain in mdlm.
    rows = [[MASK, 3, *[MASK] * 10], [0, MASK, 2, *[MASK] * 6]]
    canvas = canvas_of(rows)
    plan = passes.plan(
        toy.config(objective, 1.0, 12), schedule.left_to_right(canvas),
        mask_id=toy.MASK, start_token=toy.START,
    )  # fmt: skip
    found = loops.by_confidence(
        NETWORK, plan, GREEDY, row_keys(canvas.seeds), cached=objective == "eso_b",
        tokens_per_pass=most, threshold=threshold,
    )  # fmt: skip
    text, revealed = np.asarray(found.text), np.asarray(found.revealed_at)
    first = revealed[revealed >= 0].min()
    for b, row in enumerate(rows):
        order = sorted((p for p in range(len(row)) if row[p] == MASK), key=lambda p: revealed[b, p])
        known = [p for p in range(len(row)) if row[p] != MASK]
        for n in range(first, int(found.passes)):
            new = [p for p in order if revealed[b, p] == n]
            left = [p for p in order if revealed[b, p] >= n]
            if not left:
                break
            assert 1 <= len(new) <= most
            want = [_certain(objective, text[b], known, p, left, len(row)) for p in left]
            by = sorted(want, key=lambda pair: (-round(np.log(pair[0]) / STEP), pair[1]))
            chosen = {p for p in new}
            limit = [p for c, p in by[:most] if not threshold or c >= threshold] or [by[0][1]]
            assert chosen == set(limit)
            known += [p for _, p in by if p in chosen]  # in this order they are cached


def _certain(objective, text, known, place, left, length):
    """(probability of the likeliest token at `place`, place), by an uncached pass."""
    if objective == "mdlm":
        masks = [p for p in left if p != place] + [place]
        row = [(text[p], p, 0) for p in known] + [(toy.MASK, p, 0) for p in masks]
    else:
        row = [(text[p], p, r) for r, p in enumerate(known)] + [(toy.MASK, place, len(known))]
    logits = toy.logits_at_end([row], 12)[0, -1]
    return np.exp(toy.log_probs(logits).max()), place


def test_equal_confidences_come_from_left_to_right():
    """Also if a device rounds each of them differently."""
    rng = np.random.default_rng(0)
    logits = np.tile(rng.normal(size=5), (2, 8, 1)) + 1e-6 * rng.normal(size=(2, 8, 5))
    logits[0, 3] *= 1.01  # more certain than the others
    settings = types.SimpleNamespace(max_tokens_per_pass=3, threshold=0.0, sampler=CHOICE)
    is_masked = np.arange(8)[None] >= np.array([[1], [4]])
    chosen, keep = _most_confident(settings, jnp.asarray(logits, jnp.float32), is_masked)
    np.testing.assert_array_equal(chosen, [[3, 1, 2], [4, 5, 6]])
    assert keep.all()


def test_confidence_ends_whatever_the_model_says():
    broken = NETWORK.replace(logits=NETWORK.logits * jnp.nan)
    config = toy.config("eso_b", 1.0, 12)
    config.sample.update({"loop": "confidence", "tokens_per_pass": 3})
    generator = Generator.of(config, Canvas.empty(2, 12), toy.SPECIAL)
    assert int(generator.run(broken).passes) == 4


# On a mesh.


@pytest.mark.parametrize("shape", [pytest.param((2, 1, 1, 1), marks=thorough), (1, 2, 2, 1)])
def test_a_mesh_gives_the_same_texts(shape):
    devices = np.array(jax.devices()[: np.prod(shape)]).reshape(shape)
    mesh = Mesh(devices, AXES)
    canvas = canvas_of([[MASK] * 12, [0, 2, *[MASK] * 10], [MASK] * 9, [3, MASK, MASK]])
    on_mesh = network.fold(toy.CONFIG, toy.PARAMS, mesh)
    fields_of_loops = (
        {},
        {"steps": 4},
        {"loop": "speculative", "draft_tokens": 3},
        {"loop": "confidence", "tokens_per_pass": 2},
    )
    for fields in fields_of_loops:
        config = toy.config("eso_b", 0.5, 12)
        config.sample.update(fields)
        want = np.asarray(Generator.of(config, canvas, toy.SPECIAL).run(NETWORK).text)
        generator = Generator.of(config, canvas, toy.SPECIAL, mesh=mesh)
        inside = np.arange(12)[None] < canvas.length[:, None]
        # As `sample` runs it, and, of one loop, as the Python API does.
        for run_texts in (generator.compile(on_mesh), generator.run)[: 1 if fields else 2]:
            found = np.asarray(run_texts(on_mesh).text)
            np.testing.assert_array_equal(found[inside], want[inside])


def compiled(plan, keys, mesh=None):
    """(state before the first pass, text of the program) of a plan of one segment."""
    net = network.fold(toy.CONFIG, toy.PARAMS, mesh)
    state, programs = Plain(Task(plan, CHOICE, keys, mesh)).start(net)
    run_passes, _ = programs
    return state, run_passes.compile(net, state)[0].function.as_text()


def test_each_device_has_its_rows_and_no_others():
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(4, 1, 1, 1), AXES)
    batch = 8
    canvas = Canvas.empty(batch, 20)
    drawn = schedule.left_to_right(canvas)
    plan = passes.plan(toy.config("eso_b", 0.5, 20), drawn, mask_id=toy.MASK, start_token=toy.START)
    state, text = compiled(plan, row_keys(canvas.seeds), mesh)
    for array in (*state.cache.keys, *state.cache.values):
        assert array.sharding.shard_shape(array.shape)[0] == batch // 4
        everyone = ",".join(map(str, array.shape))
        assert f"f32[{everyone}]" not in text
    # What devices tell each other are single numbers.
    assert "all-gather(" not in text and "all-to-all(" not in text
    told = [line.split(" all-reduce(")[0] for line in text.splitlines() if " all-reduce(" in line]
    sizes = [size for line in told for size in re.findall(r"\w+\[([\d,]*)\]", line)]
    assert told and set(sizes) <= {"", "1"}


@pytest.mark.parametrize("alpha_0", [0.5, 1.0])
def test_another_seed_runs_the_same_programs(alpha_0):
    """Sizes and numbers of steps are drawn, too: forty seeds' were of nearly as many shapes."""
    found = set()
    for seed in range(40):
        drawn = schedule.ancestral(Canvas.empty(1, 64, seed), alpha_0, 16)
        plan = passes.make_plan(eso_b.FAMILY, drawn, mask_id=toy.MASK)
        shapes = tuple(plan.shape_buckets(*segment)[1] for segment in plan.segments())
        found.add((shapes, plan.rows_of_tables))
    assert len(found) <= 5, found


@pytest.mark.parametrize("few_tokens", [256, 16])
def test_few_tokens_run_in_one_shape(few_tokens):
    """Where they take as long as one; wider windows in powers of two that hold them."""
    drawn = schedule.ancestral(Canvas.empty(2, 256, 0), 1.0, 16)
    plan = passes.make_plan(eso_b.FAMILY, drawn, mask_id=toy.MASK)
    for low, high in plan.segments():
        index, shapes = plan.shape_buckets(low, high, few_tokens)
        widths, picked = np.array(shapes).T
        assert (widths[index[low:high]] >= plan.widths[low:high]).all()
        assert (picked[index[low:high]] >= plan.size[low:high].max(axis=1)).all()
        assert len(shapes) <= (1 if few_tokens == 256 else 4)


def test_a_row_that_is_done_needs_no_cache():
    canvas = canvas_of([[MASK] * 12, [0, 2, 2, MASK]])
    for drawn in (schedule.ancestral(canvas, 1.0, 4), schedule.left_to_right(canvas)):
        plan = passes.make_plan(mdlm.FAMILY, drawn, mask_id=toy.MASK)
        assert (drawn.sizes[:, 1] == 0).any() and not plan.start.any()


def test_few_shapes_hold_every_window():
    grid = [passes._round_up(n) for n in range(400)]
    assert sorted(set(grid))[:13] == [0, 1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96]
    for n, size in enumerate(grid):
        assert n <= size <= (1.5 * n if n <= 128 else n + 127)


# What must not happen.


def test_the_cache_is_not_copied():
    """In the loop, each array of the cache is updated in place."""
    config = dataclasses.replace(toy.CONFIG, blocks=2)
    length, batch = 640, 2
    canvas = Canvas.empty(batch, length)
    plan = passes.plan(
        toy.config("eso_b", 0.5, length), schedule.left_to_right(canvas),
        mask_id=toy.MASK, start_token=toy.START,
    )  # fmt: skip
    state, text = compiled(plan, row_keys(canvas.seeds))
    assert config.blocks == len(state.cache.keys) and len(state.cache.prefixes) > 1
    for shape in {array.shape for array in (*state.cache.keys, *state.cache.values)}:
        name = "f32[" + ",".join(map(str, shape)) + "]"
        lines = [line for line in text.splitlines() if name in line and " copy(" in line]
        inside = [line for line in lines if "while/body" in line]
        assert not inside, inside


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([[0, 4]], "token 4 at position 1 is not in 0..3"),
        ([[2**40]], "is not in 0..3"),
        ([[0, 1.5]], "token 1.5 at position 1 is not in 0..3"),
        ([[toy.MASK, MASK]], "is the mask token"),
    ],
)
def test_tokens_that_cannot_be_known_are_refused(rows, told):
    with pytest.raises(UserError, match=told):
        canvas_of(rows)


@pytest.mark.parametrize(
    ("objective", "known"), [("ar", {1: 2}), ("ar", {3: 0}), ("bd3", {3: 2}), ("bd3", {2: 0})]
)
def test_an_infilling_that_the_family_cannot_do_is_refused(objective, known):
    canvas = canvas_of([[known.get(i, MASK) for i in range(L)]])
    drawn = schedule.left_to_right(canvas)
    with pytest.raises(UserError, match=rf"text 0 .*objective {objective} generates"):
        run(objective, drawn, canvas.seeds)


@pytest.mark.parametrize(
    ("objective", "fields", "told"),
    [
        ("ar", {"loop": "confidence"}, "sample.loop='confidence': must be plain with objective ar"),
        ("bd3", {"schedule": "blockwise", "block_length": 3}, "sample.block_length=3"),
        ("mdlm", {"length": 9}, "sample.length=9"),
        ("ar", {"draft_tokens": 2}, "no mask to draft with"),
        ("ar", {"loop": "speculative"}, "sample.loop='speculative': must be plain .*no mask"),
        ("mdlm", {"draft_tokens": 2}, "known tokens read later ones"),
        ("eso_b", {"draft_tokens": 2, "loop": "confidence"}, "sample.draft_tokens=2"),
        ("eso_b", {"draft_tokens": 2, "loop": "plain"}, "sample.draft_tokens=2"),
        ("eso_b", {"draft_tokens": 2, "steps": 4}, "sample.steps=4"),
        ("eso_b", {"schedule": "strided", "loop": "confidence"}, "sample.schedule='strided'"),
        ("eso_b", {"steps": 3, "schedule": "left_to_right"}, "sample.steps=3"),
        ("eso_b", {"tokens_per_pass": 2}, "sample.tokens_per_pass=2"),
        (
            "eso_b",
            {"loop": "confidence", "confidence_threshold": 0.5},
            "sample.confidence_threshold=0.5",
        ),
        ("eso_b", {"loop": "confidence", "stop_at_eos": True}, "sample.stop_at_eos=True"),
        ("eso_b", {"draft_adaptive": True}, "sample.draft_adaptive=True"),
    ],
)
def test_ways_that_the_family_has_not_are_refused(objective, fields, told):
    config = toy.config(objective, {"ar": 0.0, "mdlm": 1.0}.get(objective, 0.5), 8)
    config.sample.update(fields)
    with pytest.raises(UserError, match=told):
        make_schedule(config, Canvas.empty(2, 8))
