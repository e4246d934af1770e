"""The generations that benchmarks/sampling.py times."""

import dataclasses
import statistics
import time
import types

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import sampling_limits
from esolm_jax.family.labels import Tokens
from esolm_jax.model import transformer as model
from esolm_jax.model.model_config import ModelConfig
from esolm_jax.sampling.engine import network
from esolm_jax.sampling.engine.choose import TokenSampler
from esolm_jax.sampling.loops.loop import Task, row_keys
from esolm_jax.sampling.loops.plain import Plain
from esolm_jax.sampling.plan import passes, schedule
from esolm_jax.sampling.plan.canvas import Canvas
from esolm_jax.sampling.plan.passes import NEVER

FAMILIES = "eso_b ar mdlm bd3:4 bd3:16".split()
LENGTHS = 256, 512, 1024, 2048, 4096, 8192
BATCHES = 1, 8
MASK, START = 1024, 0
CONFIG = ModelConfig(vocab_size=MASK + 1, width=256, blocks=4, heads=8, cond_width=128, unroll=4)
AR_CONFIG = dataclasses.replace(CONFIG, cond_width=0)  # as published
SCORES = 3 * 2**30  # bytes that the scores of a window with itself may take
WHOLE = 60  # seconds: generations that should take longer are timed in part,
PART = 15  # for about so long


@dataclasses.dataclass(frozen=True)
class Case:
    """One generation. `family` is an objective with its block length; num_steps = 0: one token a
    pass."""

    family: str
    length: int
    batch: int
    num_steps: int = 0
    alpha_0: float = 1.0

    @property
    def objective(self) -> str:
        return self.family.partition(":")[0]

    @property
    def block_length(self) -> int:
        return int(self.family.partition(":")[2] or 0)

    @property
    def name(self) -> str:
        alpha_0 = f", alpha_0 = {self.alpha_0:g}" if self.alpha_0 < 1 else ""
        return f"{self.family} {self.batch} x {self.length}, T = {self.num_steps or 'L'}{alpha_0}"

    def plan(self, rows: int) -> passes.DecodePlan:
        canvas = Canvas.empty(rows, self.length)
        if self.objective == "ar":
            found = schedule.left_to_right(canvas)
        elif self.objective == "bd3":
            found = schedule.blockwise(canvas, self.block_length, 1.0, self.num_steps)
        else:
            found = schedule.ancestral(canvas, self.alpha_0, self.num_steps)
        config = types.SimpleNamespace(objective=self.objective, block_length=self.block_length)
        return passes.plan(config, found, mask_id=MASK, start_token=START)


def cases(families, lengths, batches) -> list[Case]:
    """AR has one token per pass only. α₀ = 0.5 with T = L is what the published code is known to
    take 902 passes for at L = 1024."""
    found = []
    for length in lengths:
        for batch in batches:
            for family in families:
                found.append(Case(family, length, batch))
                if family != "ar":
                    found.append(Case(family, length, batch, length // 4))
                if family == "eso_b" and length == 1024:
                    found.append(Case(family, length, batch, length, 0.5))
    return found


def random_params(config: ModelConfig) -> dict:
    """Weights as before training, but for those that are zero then."""

    def filled(path, leaf):
        del path
        noise = 0.02 * np.random.default_rng(leaf.size).standard_normal(leaf.shape, np.float32)
        return leaf if leaf.any() else jnp.asarray(noise)

    return jax.tree.map_with_path(filled, model.init(config, jax.random.key(0)))


def training_forward_seconds(params: dict, case: Case) -> float:
    """Of MDLM's forward pass as training runs it, over all rows, with logits of all tokens."""
    rows = _rows_that_fit(case)
    zeros = jnp.zeros((rows, case.length), jnp.int32)
    position = jnp.broadcast_to(jnp.arange(case.length)[None], zeros.shape)
    tokens = Tokens(token=zeros, position=position, rank=zeros, in_context=zeros == 0)
    forward, taken = jax.jit(model.bind(CONFIG)), []
    for _ in range(4):
        begin = time.perf_counter()
        jax.block_until_ready(forward(params, tokens))
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken[1:]) * case.batch / rows


def _rows_that_fit(case: Case) -> int:
    rows = case.batch
    while rows > 1 and 4 * rows * CONFIG.heads * case.length**2 > SCORES:
        rows //= 2
    return rows


def spread_evenly(plan: passes.DecodePlan, count: int) -> passes.DecodePlan:
    """`count` of the passes, one from each of as many equal stretches: from a random place in it,
    lest they fall in step with the blocks of bd3."""
    edges = np.arange(count) + np.random.default_rng(0).random(count)
    at = (edges * len(plan.size) / count).astype(int)
    names = "start first size end bidirectional_below leftmost_unknown".split()
    return plan.replace(**{name: getattr(plan, name)[at] for name in names})


class Ours:
    """A case, compiled; of a long one, some of the passes, and of a large one some of the rows."""

    def __init__(self, case: Case, net: network.Network):
        self.case, self.net = case, net
        rows = _rows_that_fit(case) if case.objective == "mdlm" else case.batch
        begin = time.perf_counter()
        plan = case.plan(rows)
        self.plan_seconds = time.perf_counter() - begin
        self.nfe, self.rows = len(plan.size), rows
        self.needed = sampling_limits.needed(net.config, plan)
        scale = case.batch / rows  # of passes so long, that more rows take as much longer each
        self.needed["flops_per_pass"] *= scale
        guess = self._guess(plan)
        self.count = self.nfe
        if self.nfe * guess > WHOLE:
            self.count = min(self.nfe, max(3, round(PART / guess)))
            plan = spread_evenly(plan, self.count)
        self.loop = Plain(Task(plan, TokenSampler(MASK), row_keys(Canvas.empty(rows, 1).seeds)))
        begin = time.perf_counter()
        self._generate = self.loop.compile(net)
        self.compile_seconds = time.perf_counter() - begin
        self.start_seconds = self._start_seconds()

    def _guess(self, plan) -> float:
        """Seconds of a pass, on a slow machine: how much is timed must not depend on the hour."""
        window = float((plan.end - plan.start).mean())
        scores = 4 * self.rows * self.net.config.heads * window**2 * self.net.config.blocks
        flops = self.needed["flops_per_pass"] * self.rows / self.case.batch
        return 1e-3 + flops / 4e10 + (self.needed["bytes_per_pass"] + 8 * scores) / 1e10

    def _start_seconds(self) -> float:
        """Seconds until the first pass: the state and its empty cache."""
        begin = time.perf_counter()
        jax.block_until_ready(self.loop.start(self.net)[0])
        return time.perf_counter() - begin

    def _timed(self) -> float:
        begin = time.perf_counter()
        out = jax.block_until_ready(self._generate(self.net))
        seconds = time.perf_counter() - begin
        generated = np.asarray(out.revealed_at) < NEVER
        if int(out.passes) != self.count or not (self.count < self.nfe or generated.all()):
            raise RuntimeError(f"{self.case.name}: {out.passes} passes ran")
        return seconds

    def run(self) -> tuple[float, float]:
        """(seconds that it took, seconds of the whole generation)."""
        taken = self._timed()
        whole = self.start_seconds + (taken - self.start_seconds) * self.nfe / self.count
        return taken, whole * self.case.batch / self.rows
