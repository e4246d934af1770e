"""Programs of the other verbs: one batch of evaluation, one sampler step."""

import functools

import jax
import jax.numpy as jnp

from esolm_jax.aot import hlo, report
from esolm_jax.aot.chips import Chip
from esolm_jax.evaluation import likelihood
from esolm_jax.family.phase import make_phases
from esolm_jax.parallel import sharding
from esolm_jax.process import prng
from esolm_jax.sampling.engine import cache as cache_lib
from esolm_jax.sampling.engine import network as network_lib
from esolm_jax.sampling.engine.network import Window
from esolm_jax.training.train_step import Trainer

OTHERS = ("evaluate", "sample")


def _rows(training: Trainer, shape, dtype=jnp.int32):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.rows(training.built.mesh))


def evaluation(config, training: Trainer):
    """One draw of the NELBO for a batch of config.eval.batch_size windows, lowered."""
    built = training.built
    phases = make_phases(config, built.special, low_variance=False)
    draw = functools.partial(likelihood.nelbo, built.apply, phases, built.head)
    shape = config.eval.batch_size, config.data.seq_len
    key = jax.eval_shape(lambda: prng.key(0))
    params = training.abstract_state().params
    x, valid = _rows(training, shape), _rows(training, shape, jnp.bool_)
    return jax.jit(draw).lower(params, key, x, valid)


def sampler_step(config, training: Trainer):
    """One pass of a sampler of config.sample.num_texts: the newest token and a mask of each text,
    over a full KV cache."""
    built = training.built
    model, mesh = built.model, built.mesh
    batch, length = config.sample.num_texts, config.data.seq_len

    def one_pass(network, token, position, filled, cache):
        rank = jnp.broadcast_to(jnp.arange(2)[None], token.shape)
        pick = jnp.ones((batch, 1), jnp.int32)
        window = Window(token, position, rank, jnp.ones_like(token, bool), filled, pick)
        logits, entries = network_lib.forward(network, window, cache)
        return logits, cache.write(entries, filled)

    params = training.abstract_state().params
    make = functools.partial(network_lib.fold, model, params)
    network = sharding.abstract(make, network_lib.shardings(jax.eval_shape(make), mesh))
    make = functools.partial(cache_lib.empty_cache, model, batch, length + 2, mesh, aligned=True)
    rows = sharding.named_sharding(mesh, "rows", "heads")
    cache = sharding.abstract(make, jax.tree.map(lambda _: rows, jax.eval_shape(make)))
    two, filled = _rows(training, (batch, 2)), jax.ShapeDtypeStruct((batch,), jnp.int32)
    return jax.jit(one_pass, donate_argnums=4).lower(network, two, two, filled, cache)


def measure(program: str, config, training: Trainer, chip: Chip) -> dict:
    """HBM, FLOPs and collectives of a program on one chip."""
    lowered = {"evaluate": evaluation, "sample": sampler_step}[program](config, training)
    compiled = lowered.compile()
    stats = compiled.memory_analysis()
    output = stats.output_size_in_bytes - stats.alias_size_in_bytes
    total = stats.argument_size_in_bytes + stats.temp_size_in_bytes + output
    chunks = (
        config.eval.batch_size * config.data.seq_len / sharding.num_row_shards(training.built.mesh)
    )
    cost = hlo.analyse(
        compiled.as_text(),
        trip_counts={"predicted_chunks": chunks / config.model.loss_chunk},
        kernel_flops=report.kernel_flops(training, compiled.as_text()),
    )
    return {
        "program": program,
        "hbm": {
            "arguments": stats.argument_size_in_bytes,
            "temporaries": stats.temp_size_in_bytes,
            "total": total,
            "available": chip.hbm_bytes,
            "fits": total <= chip.hbm_bytes,
        },
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
