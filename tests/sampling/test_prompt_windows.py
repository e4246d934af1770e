"""Prompts of any length run the same programs, and read what one window of their length reads."""

import jax
import loops
import numpy as np
import pytest
import toy

from esolm_jax.sampling.engine import network
from esolm_jax.sampling.engine.choose import TokenSampler
from esolm_jax.sampling.loops.loop import Task, row_keys
from esolm_jax.sampling.loops.plain import Plain
from esolm_jax.sampling.loops.run_passes import run_passes
from esolm_jax.sampling.loops.speculative import Speculative
from esolm_jax.sampling.plan import passes, schedule
from esolm_jax.sampling.plan.canvas import MASK, Canvas, Seed

NETWORK = network.fold(toy.CONFIG, toy.PARAMS)
SAMPLER = TokenSampler(toy.MASK)


def canvas_of(known: list[int], length: int) -> Canvas:
    """A row for each number of known tokens, which come first in the text."""
    text = np.random.default_rng(0).choice(toy.REAL, length).tolist()
    rows = [text[:n] + [MASK] * (length - n) for n in known]
    return Canvas.of(rows, [Seed(3, b) for b in range(len(rows))], vocab_size=4, mask_id=toy.MASK)


def plan_of(objective: str, canvas: Canvas) -> passes.DecodePlan:
    length = canvas.token.shape[1]
    drawn = {
        "ar": schedule.left_to_right,
        "bd3": lambda canvas: schedule.blockwise(canvas, toy.BLOCK, 1.0, 0),
        "eso_b": lambda canvas: schedule.ancestral(canvas, 0.5, 0),
    }[objective](canvas)
    config = toy.config(objective, 0.5, length)
    return passes.plan(config, drawn, mask_id=toy.MASK, start_token=toy.START)


def decode(objective: str, canvas: Canvas):
    plan = plan_of(objective, canvas)
    keys = row_keys(canvas.seeds)
    return plan, loops.decode(NETWORK, plan, SAMPLER, keys, with_logits=True)


@pytest.mark.parametrize("objective", ["ar", "bd3", "eso_b"])
def test_windows_of_few_sizes_give_the_texts_of_one_window(objective, monkeypatch):
    """Also where the last window would end behind the text, and begins earlier."""
    canvas = canvas_of([21, 2, 14, 0], 22) if objective != "bd3" else canvas_of([20, 2, 14, 0], 22)
    monkeypatch.setattr(passes, "PROMPT_WINDOWS", ((22, 22),))
    one, want = decode(objective, canvas)
    monkeypatch.setattr(passes, "PROMPT_WINDOWS", ((1, 1), (22, 8)))
    several, found = decode(objective, canvas)
    assert (one.prompt_passes, several.prompt_passes) == (1, 3)
    low = several.start[: several.prompt_passes]
    assert low.max() + 8 <= 22 and (low % 8).any()  # one begins earlier
    np.testing.assert_array_equal(found.text, want.text)
    generated = np.asarray(want.revealed_at) >= 0
    assert np.ptp(np.asarray(want.logits)[generated]) > 0.3
    np.testing.assert_allclose(found.logits, want.logits, atol=2e-5)


@pytest.mark.parametrize("objective", ["ar", "bd3", "eso_b"])
def test_a_window_holds_whole_blocks(objective):
    """And every known slot is in one, for prompts of all lengths."""
    length = 1100
    rank = toy.BLOCK if objective == "bd3" else 1
    for known in (2, 15, 16, 17, 64, 100, 512, 513, 1000, 1098):
        plan = plan_of(objective, canvas_of([known], length))
        low, high = (a[: plan.prompt_passes, 0] for a in (plan.start, plan.end))
        assert (high % rank == 0).all() and (high[:-1] >= low[1:]).all() and low[0] == 0
        assert high[-1] == known // rank * rank
        assert (low + 256 <= length).all() or known <= 512


class Kind:
    """What a program is compiled for: two of one kind are one program."""

    def __init__(self, objective: str, known: int, loop=Plain):
        canvas = canvas_of([known] * 2, 96)
        task = Task(plan_of(objective, canvas), SAMPLER, row_keys(canvas.seeds))
        state, programs = loop(task).start(NETWORK)
        kinds = [self._of(program.args) for program in programs]
        self.all = {(kind, self._of(state)) for kind in kinds}

    @staticmethod
    def _of(tree):
        leaves, structure = jax.tree.flatten(tree)
        return str(structure), *(str(jax.typeof(leaf)) for leaf in leaves)


@pytest.mark.parametrize(
    ("objective", "loop"),
    [
        ("eso_b", Plain),
        ("ar", Plain),
        ("bd3", Plain),
        ("eso_b", lambda task: Speculative(task, 4, False, "chain")),
    ],
)
def test_prompts_of_all_lengths_share_their_programs(objective, loop):
    """One without a prompt, and one more for each size of the windows that read it."""
    found = [Kind(objective, known, loop).all for known in range(0, 92, 2)]
    alone, *prompted = found
    assert all(kinds & alone == prompted[0] & alone for kinds in prompted)
    assert len(set.union(*prompted) - alone) == 2


def test_another_prompt_compiles_nothing():
    """One program of the prompt and one of the passes serve all lengths."""
    counts = []
    for known in (20, 33, 64, 65, 90):
        before = run_passes._default._cache_size()
        plan = plan_of("eso_b", canvas_of([known], 96))
        loops.decode(NETWORK, plan, SAMPLER, row_keys([Seed(0, 0)]))
        counts.append(run_passes._default._cache_size() - before)
    assert counts == [2, 0, 0, 0, 0]
