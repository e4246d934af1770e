"""One batch of evaluation, compiled."""

import functools

import jax
import jax.numpy as jnp

from esolm_jax.aot import hlo, report, topology
from esolm_jax.aot.chips import Chip
from esolm_jax.aot.kernel_flops import USUAL, kernel_flops
from esolm_jax.evaluation import likelihood
from esolm_jax.family import trim
from esolm_jax.parallel import sharding
from esolm_jax.process import prng
from esolm_jax.training.train_step import Trainer


def _rows(training: Trainer, shape, dtype=jnp.int32):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.rows(training.built.mesh))


def lowered(config, training: Trainer):
    """One draw of the NELBO for a batch of config.eval.batch_size windows, lowered."""
    built = training.built
    phases = likelihood.bound_phases(config, built.special)
    draw = functools.partial(likelihood.nelbo, built.apply, phases, built.head)
    shape = config.eval.batch_size, config.data.seq_len
    key = jax.eval_shape(lambda: prng.key(0))
    params = training.abstract_state().params
    x, valid = _rows(training, shape), _rows(training, shape, jnp.bool_)
    return jax.jit(draw).lower(params, key, x, valid)


def measure(config, training: Trainer, chip: Chip) -> dict:
    """HBM, FLOPs and collectives on one chip; the usual branch is the trimmed pass."""
    with topology.compiling_for(training.built.mesh):
        compiled = lowered(config, training).compile()
    mesh, model = training.built.mesh, training.built.model
    tokens = config.eval.batch_size * config.data.seq_len // sharding.num_row_shards(mesh)
    head = training.built.head.sized(tokens, model.vocab_size // mesh.shape["tensor"])
    rows, length = config.eval.batch_size, config.data.seq_len
    phases = likelihood.bound_phases(config, training.built.special)
    queries = [trim.kept_queries(phase, length, rows, mesh) for phase in phases]
    cost = hlo.analyse(
        compiled.as_text(),
        trip_counts={"predicted_chunks": tokens / head.chunk},
        branches=USUAL,
        kernel_flops=kernel_flops(training, compiled.as_text(), queries),
    )
    return {
        "program": "evaluate",
        "hbm": report.program_memory(compiled, chip),
        "flops": cost.flops,
        "collectives": dict(cost.collectives),
    }


def show(figures: dict) -> None:
    hbm, gib = figures["hbm"], 2.0**30
    sent = ", ".join(f"{k} {v / 1e6:.1f} MB" for k, v in figures["collectives"].items()) or "none"
    print(
        f"{figures['program']}: {hbm['arguments'] / gib:.2f} GiB of arguments, "
        f"{hbm['temporaries'] / gib:.2f} of temporaries, {hbm['total'] / gib:.2f} in total of "
        f"{hbm['available'] / gib:.2f}; {figures['flops'] / 1e12:.4f} TFLOPs; sends {sent}"
    )
