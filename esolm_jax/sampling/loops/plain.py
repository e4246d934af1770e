"""The plain loop: the passes of the plan, one after the other."""

import dataclasses

import flax.struct
import jax

from esolm_jax.sampling.engine.network import Network
from esolm_jax.sampling.loops.loop import Decoded, Loop, Program, Task, unpermute
from esolm_jax.sampling.loops.run_passes import State, segments_of, start_state


@dataclasses.dataclass(frozen=True)
class Plain(Loop):
    """Follows the schedule.

    Attributes:
      task: see Task.
      with_logits: also return the logits that each token was drawn from (mask token not excluded).
    """

    task: Task
    with_logits: bool = False

    def start(self, network: Network) -> tuple[State, list[Program]]:
        plan = self.task.plan
        _, margin, programs = segments_of(self.task, plan.segments())
        state = start_state(
            network,
            self.task,
            margin,
            cached=plan.reads_cache,
            aligned=plan.aligned,
            with_logits=self.with_logits,
        )
        return state, [*programs, Program(in_text_order, Places(plan.order, plan.shift))]


@flax.struct.dataclass
class Places:
    """Text positions of ranks: `order` int32 [B, L], and the shift of a decode plan."""

    order: jax.Array
    shift: int = flax.struct.field(pytree_node=False)


@jax.jit
def in_text_order(network: Network, state: State, places: Places) -> Decoded:
    """The last program of a chain."""
    del network
    by_rank = [state.known[:, places.shift :], state.revealed_at]
    if state.log_p is not None:
        by_rank.append(state.log_p)
    text, revealed_at, *log_p = unpermute(places.order, *by_rank)
    length = places.order.shape[1]
    return Decoded(
        text=text,
        revealed_at=revealed_at,
        eos_position=state.eos_position,
        passes=state.pass_index,
        logits=None if state.logits is None else state.logits[:, :length],
        log_p=log_p[0] if log_p else None,
    )
