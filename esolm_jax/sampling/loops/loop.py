"""The protocol of the decoding loops: Task (input), Loop (start, run, compile), Decoded (output).

A loop is a chain of jitted programs, each from one state to the next; the last returns a `Decoded`.
`run` calls them, and compiles new ones. `compile` compiles all of them ahead of time.
"""

import abc
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from esolm_jax.parallel import distributed, multihost, sharding, stored_programs
from esolm_jax.process import prng
from esolm_jax.sampling.engine.cache import pad_to
from esolm_jax.sampling.engine.network import Network
from esolm_jax.sampling.plan.passes import NEVER, DecodePlan

Sampler = Callable[..., jax.Array]  # choose.TokenSampler, or any hashable callable of its form


@flax.struct.dataclass
class Decoded:
    """The generated texts, in text order.

    Attributes:
      text: int32 [B, L].
      revealed_at: int32 [B, L], the pass (counting the prompt's) that generated each token; −1 =
        known, NEVER = not generated, because the text had ended.
      eos_position: int32 [B], the position of the first EOS, or NEVER.
      passes: int32, number of passes, those of the prompt included.
      logits: float32 [B, L, V] by rank, or None.
      log_p: float32 [B, L], the log-probability with which the sampler draws each token, 0 at known
        ones; None unless Task.text is given.
      drafts: figures of speculation by name, each int32 [B, k − 1]; {} in other loops.
    """

    text: jax.Array
    revealed_at: jax.Array
    eos_position: jax.Array
    passes: jax.Array
    logits: jax.Array | None = None
    log_p: jax.Array | None = None
    drafts: dict[str, jax.Array] = flax.struct.field(default_factory=dict)


class Ends(NamedTuple):
    """Ids of the tokenizer: the end of a text, and of a turn in a chat."""

    eos: int | None = None
    eot: int | None = None


@dataclasses.dataclass(frozen=True)
class Task:
    """The input of a loop: the passes, and how tokens are drawn.

    Attributes:
      plan: the passes of B rows; see plan/passes.py.
      sampler: draws tokens from logits; hashable.
      row_keys: one key per row, from row_keys().
      mesh: None = one device. B must be a multiple of its row shards.
      cache_dtype: of config.sample.cache_dtype.
      eos_id: if not None, a text ends at its first generated EOS after all known tokens, once all
        tokens before it are known; the loop ends with the last text.
      text: int32 [B, L] in text order: teacher forcing. The loop takes these tokens instead of
        drawing, and computes their log-probabilities. None = draw.
    """

    plan: DecodePlan
    sampler: Sampler
    row_keys: jax.Array
    mesh: Mesh | None = None
    eos_id: int | None = None
    text: np.ndarray | None = None
    cache_dtype: str = "auto"


class Jitted:
    """A jitted function (network, state, args) → state that takes over the state's memory. The
    compiler's options depend on the platform of the network."""

    OPTIONS: Mapping[str, dict] = {
        # A product whose sum is split writes partial float32 sums, and another kernel adds them:
        # at 32 texts a fourth of all bytes that a pass of `small` moves, and a kernel in ten.
        "gpu": {"xla_gpu_experimental_force_split_k": 1},
    }

    def __init__(self, function: Callable):
        functools.update_wrapper(self, function)
        jit = functools.partial(jax.jit, function, donate_argnames="state")
        self._default = jit()
        self._by_platform = {
            name: jit(compiler_options=options) for name, options in self.OPTIONS.items()
        }
        self._together = functools.cache(multihost.together)

    def _function(self, network: Network):
        device = next(iter(network.embedding.sharding.device_set))
        return self._by_platform.get(device.platform, self._default)

    def __call__(self, network: Network, state, args):
        function = self._function(network)
        if distributed.is_started():
            function = self._together(function)
        return function(network, state, args)

    def lower(self, network: Network, state, args):
        return self._function(network).lower(network, state, args)


@dataclasses.dataclass(frozen=True)
class Program:
    """One jitted program, and its arguments besides the network and the state, as a pytree."""

    function: Any
    args: Any

    def __call__(self, network: Network, state):
        return self.function(network, state, self.args)

    def compile(self, network: Network, state, **options) -> tuple["Program", Any]:
        """(the compiled program, the shapes and shardings of the state that it returns). `options`
        are the compiler's."""
        function, arguments = self.function, (network, state, self.args)
        name = f"{function.__module__}.{function.__qualname__}"
        compiled = stored_programs.compile_or_load(name, function.lower, arguments, options)
        return Program(compiled, self.args), compiled.out_info


class Loop(abc.ABC):
    """A way to generate the texts of a Task."""

    task: Task

    @abc.abstractmethod
    def start(self, network: Network) -> tuple[Any, list[Program]]:
        """The state before the first pass, and the programs, of which the last returns Decoded."""

    def order(self, decoded: Decoded) -> np.ndarray:
        """int32 [B, L]: positions as they were generated, the known ones first. Of a loop that
        decides the order, the tokens of one pass from left to right."""
        if not self.decides_order:
            return self.task.plan.order
        return np.argsort(decoded.revealed_at, axis=1, kind="stable").astype(np.int32)

    @property
    def decides_order(self) -> bool:
        """Whether the loop chooses the generation order, not the schedule."""
        return False

    def run(self, network: Network) -> Decoded:
        """Generates the texts. `network`: from network.fold, on the mesh of the task."""
        return self._run(network, *self.start(network))

    def compile(self, network: Network) -> Callable[[Network], Decoded]:
        """Compiles all programs. The function that is returned runs them."""
        compiled = self.compiled(network)
        return lambda network: self._run(network, self.start(network)[0], compiled)

    def compiled(self, network: Network, **options) -> list[Program]:
        """All programs, compiled. On a mesh of described devices (aot/topology.py) `network` holds
        ShapeDtypeStructs. `options` are the compiler's."""
        state, programs = self.start(network)
        compiled = []
        for program in programs:
            program, state = program.compile(network, state, **options)
            compiled.append(program)
        return compiled

    @staticmethod
    def _run(network: Network, state, programs: list[Program]) -> Decoded:
        for program in programs:
            state = program(network, state)
        return state


def row_keys(seeds, mesh: Mesh | None = None) -> jax.Array:
    """One key per row, which depends on its Seed only."""
    batch, row = (np.array([getattr(s, n) for s in seeds], np.uint32) for n in ("batch", "row"))
    if sharding.spans_processes(mesh):
        batch, row = over_rows(mesh, (batch, row))
    return _row_keys(batch, row)


@jax.jit
@jax.vmap
def _row_keys(batch, row):
    return jax.random.fold_in(prng.key(batch), row)


def draw(sampler: Sampler, text_BL, logits_BPV, position_BP, noise: Callable):
    """(tokens [B, P] at these positions, their log-probabilities): drawn with noise(), and None; or
    those of a text, if it is not None."""
    if text_BL is None:
        return sampler(logits_BPV, position_BP, noise()), None
    token_BP = jnp.take_along_axis(text_BL, position_BP, axis=1)
    log_p = sampler.log_probs(logits_BPV)
    return token_BP, jnp.take_along_axis(log_p, token_BP[..., None], axis=-1)[..., 0]


def over_rows(mesh: Mesh | None, by_row):
    """Arrays [B, …] on the mesh, on each device those of its rows; without a mesh, as they are."""
    return by_row if mesh is None else sharding.put(by_row, sharding.rows(mesh))


def scatter_columns(array, new, offset, keep):
    """Writes the kept columns of new [B, P, …] to array [B, S, …] at [b, offset[b, p]]."""
    offset = jnp.where(keep, offset, array.shape[1])
    scatter = jax.vmap(lambda row, offset, new: row.at[offset].set(new, mode="drop"))
    return scatter(array, offset, new)


def pad_columns(array, width: int):
    """[B, width, …], with zeros at the end of the second axis."""
    return pad_to(array, 1, width)


def unpermute(order, *by_rank):
    """Each array's first L columns, moved from rank to text position by `order` [B, L]: [B, L]."""
    parts = [array[:, : order.shape[1]] for array in by_rank]
    return [jnp.put_along_axis(jnp.zeros_like(a), order, a, axis=1, inplace=False) for a in parts]


def last_known(tables: DecodePlan):
    """int32 [B, 1]: the last known position, −1 for none; an EOS before it does not end a text."""
    is_known = jnp.arange(tables.order.shape[1])[None] < tables.num_known[:, None]
    return jnp.where(is_known, tables.order, -1).max(axis=1, keepdims=True)


def first_eos(tables: DecodePlan, is_eos_BS, position_BS):
    """int32 [B]: the leftmost of these EOS positions behind all known tokens, or NEVER."""
    is_end = is_eos_BS & (position_BS > last_known(tables))
    return jnp.where(is_end, position_BS, NEVER).min(axis=1)
