"""Cached decoding, greedy and from recorded noise, against the published implementation."""

import dataclasses

import jax
import jax.numpy as jnp
import loops
import numpy as np
import pytest
from compilation import compiling
from golden_files import close, model, vectors

from esolm_jax.family import ar, eso_b
from esolm_jax.sampling.engine import caches, network
from esolm_jax.sampling.engine.choose import TokenSampler, keep_top_k, top_p_filter
from esolm_jax.sampling.plan import passes, schedule
from esolm_jax.sampling.plan.canvas import Canvas
from esolm_jax.sampling.plan.schedule import Schedule

MASK = 66
KEY = jax.random.key(0)


@dataclasses.dataclass(frozen=True)
class Forced:
    """Chooses the recorded token of each text position."""

    case: str

    def __call__(self, logits, position_BP, noise_BPV):
        forced = jnp.asarray(vectors(self.case)["forced_tokens"])
        return jnp.take_along_axis(forced, position_BP, axis=1)


@dataclasses.dataclass(frozen=True)
class Recorded(TokenSampler):
    """Draws with the recorded uniforms, which are stored by rank."""

    case: str = ""

    def __call__(self, logits, position_BP, noise_BPV):
        golden = vectors(self.case)
        u = golden["gumbel_u"].astype(np.float64)
        by_rank = -np.log(-np.log(u))
        batch, length, _ = u.shape
        order = golden.get("sort_idx", np.tile(np.arange(length), (batch, 1)))
        unpermute = np.zeros_like(by_rank)
        np.put_along_axis(unpermute, order[..., None], by_rank, axis=1)
        noise = jnp.asarray(unpermute, jnp.float32)
        noise = noise[jnp.arange(batch)[:, None], position_BP]
        return super().__call__(logits, position_BP, noise)


CASES = ["09_sampling_kv", "09b_sampling_kv_alpha0", "09s_sampling_kv_sharp"]


def tolerance(case):
    return 3e-4 if "sharp" in case else 2e-5


def eso_b_plan(golden, sizes=None):
    order = golden["sort_idx"]
    sizes = golden["schedule"] if sizes is None else sizes
    return passes.make_plan(eso_b.FAMILY, Schedule(order, sizes, order.shape[1]), mask_id=MASK)


def folded(golden):
    reference = model(str(golden["weights"]))
    return network.fold(reference.config, reference.params)


def run(golden, plan, choice):
    keys = jax.random.split(KEY, len(plan.order))
    found = loops.decode(folded(golden), plan, choice, keys, with_logits=True)
    return np.asarray(found.text), found.logits


@pytest.mark.parametrize("case", CASES)
def test_teacher_forced(case):
    golden = vectors(case)
    text, logits = run(golden, eso_b_plan(golden), Forced(case))
    np.testing.assert_array_equal(text, golden["forced_tokens"])
    close(logits, golden["tf_logits"], tolerance(case))


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_teacher_forced_by_the_kernels_of_a_platform(platform, monkeypatch):
    """Interpreted, which is not what users run."""
    monkeypatch.setitem(caches.KERNELS, "cpu", (platform, True))
    with compiling(fast=True):
        test_teacher_forced(CASES[1])


@pytest.mark.parametrize("case", CASES)
def test_greedy(case):
    golden = vectors(case)
    text, logits = run(golden, eso_b_plan(golden), TokenSampler(MASK, temperature=0))
    np.testing.assert_array_equal(text, golden["greedy_samples"])
    close(logits, golden["greedy_logits"], tolerance(case))
    assert len(eso_b_plan(golden).size) == golden["nfe"]


@pytest.mark.parametrize("case", CASES)
def test_greedy_through_the_public_interface(case):
    """Of the loop above it leaves out the logits alone: compiled fast."""
    golden = vectors(case)
    reference = model(str(golden["weights"]))
    with compiling(fast=True):
        found = reference.sample(golden["sort_idx"], golden["schedule"], rng=KEY, temperature=0)
    np.testing.assert_array_equal(found, golden["greedy_samples"])


@pytest.mark.parametrize(
    ("case", "k", "style"),
    [
        (CASES[2], 5, "chain"),  # many drafts fail
        (CASES[2], 2, "staircase"),
        (CASES[0], 5, "chain"),
        (CASES[1], 2, "staircase"),
    ],
)
def test_greedy_speculation_is_greedy_one_token_a_pass(case, k, style):
    """And where the published schedule is one token a step, the published tokens."""
    golden = vectors(case)
    plan, greedy = (
        eso_b_plan(golden, np.ones(golden["sort_idx"].shape[1], int)),
        TokenSampler(MASK, 0),
    )
    want, _ = run(golden, plan, greedy)
    keys = jax.random.split(KEY, len(want))
    found, _ = loops.speculate(folded(golden), plan, greedy, keys, k=k, style=style)
    np.testing.assert_array_equal(found.text, want)
    assert int(found.passes) < plan.nfe
    if (golden["schedule"] == 1).all():
        np.testing.assert_array_equal(found.text, golden["greedy_samples"])


@pytest.mark.parametrize("case", CASES)
def test_stochastic(case):
    golden = vectors(case)
    text, logits = run(golden, eso_b_plan(golden), Recorded(MASK, top_p=0.9, case=case))
    np.testing.assert_array_equal(text, golden["gumbel_samples_p09"])
    close(logits, golden["gumbel_logits"], tolerance(case))


def test_strided_order():
    golden = vectors("09c_sampling_subcontext")
    length = len(golden["sort_idx"])
    plan = schedule.strided(Canvas.empty(3, length), 1.0, int(golden["nfe"]), shuffle=False)
    np.testing.assert_array_equal(plan.order[0], golden["sort_idx"])
    text, logits = run(
        golden, passes.make_plan(eso_b.FAMILY, plan, mask_id=MASK), TokenSampler(MASK, 0)
    )
    np.testing.assert_array_equal(text, golden["greedy_samples"])
    close(logits, golden["greedy_logits"])


@pytest.mark.parametrize("start", ["bos", "mask", "none"])
@pytest.mark.parametrize("greedy", [True, False])
def test_ar(start, greedy):
    case = f"07_ar_{start}"
    golden = vectors(case)
    first = {"bos": int(golden["bos_index"]), "mask": MASK, "none": int(golden["bos_index"])}
    batch, length, _ = golden["greedy_step_logits"].shape
    plan = schedule.left_to_right(Canvas.empty(batch, length))
    plan = passes.make_plan(ar.FAMILY, plan, mask_id=MASK, start_token=first[start])
    choice = TokenSampler(MASK, 0) if greedy else Recorded(MASK, top_p=0.9, case=case)
    text, logits = run(golden, plan, choice)
    if start == "none":  # the start token is the first of the text
        text = np.insert(text, 0, first[start], axis=1)
    np.testing.assert_array_equal(
        text, golden["greedy_samples" if greedy else "gumbel_samples_p09"]
    )
    close(logits, golden["greedy_step_logits" if greedy else "gumbel_step_logits"])


@pytest.mark.parametrize("alpha_0", [1, 0.5, 0.25, 0.0625, 0])
@pytest.mark.parametrize("num_steps", [8, 64, 1024])
def test_ancestral_schedule(alpha_0, num_steps):
    golden = vectors("09d_schedule")
    name = f"a{alpha_0}_T{num_steps}"
    p = schedule.unmask_probabilities(float(alpha_0), num_steps)
    np.testing.assert_allclose(p, golden[f"p:{name}"], atol=1e-9)
    rng = np.random.default_rng(0)
    runs = [schedule.ancestral_sizes(rng, 32, float(alpha_0), num_steps) for _ in range(1000)]
    # 300 published draws: 5 standard errors of theirs
    error = 5 * np.sqrt(32 * alpha_0 * (1 - alpha_0) / 300)
    assert abs(np.mean([r.sum() for r in runs]) - golden[f"mean_tokens:{name}"]) <= error + 1e-6
    nfe = [len(r) for r in runs]
    error = 5 * np.std(nfe) / np.sqrt(300) + 1e-6
    assert abs(np.mean(nfe) - golden[f"mean_nfe_diffusion:{name}"]) <= error


FILTERS = {
    "filtered_p09": lambda logits: top_p_filter(logits, 0.9),
    "filtered_p05": lambda logits: top_p_filter(logits, 0.5),
    "filtered_k5": lambda logits: keep_top_k(logits, 5),
}


@pytest.mark.parametrize("name", FILTERS)
def test_filters(name):
    golden = vectors("12_top_p")
    filtered = FILTERS[name](jnp.asarray(golden["logits"]))
    want = golden[name]
    np.testing.assert_array_equal(np.isneginf(filtered), np.isneginf(want) | (want < -1e5))
    kept = ~np.isneginf(filtered)
    close(filtered[kept], want[kept])
