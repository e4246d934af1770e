"""The cost of reliability: the check of a training step for non-finite numbers.

python -m benchmarks.reliability.step_cost
"""

import json
import time

import jax
import numpy as np

from configs import shakespeare
from esolm_jax.data.manifest import planned_tokenizer
from esolm_jax.model import build
from esolm_jax.parallel import sharding
from esolm_jax.training import train_step


class _Unchecked(train_step.Trainer):
    """Training steps without the check."""

    def _counts(self, state, metrics):
        return np.True_


def finite_check_cost(*, rounds: int = 20, width: int = 0, blocks: int = 0) -> dict:
    """Seconds of a training step of configs/shakespeare.py with and without the check.

    Both are interleaved, from equal states and on the same batches, so that a slow period of the
    machine affects both.

    Args:
      rounds: steps of each. width, blocks: of the model; 0 = the config's.

    Returns: sizes; the median and the minimum in seconds of both; `ratio`, the median over rounds
      of (with − without) / without, which is what the check costs; its standard error and its
      quartiles.
    """
    config = shakespeare.get_config()
    with config.unlocked():
        config.mesh.devices = 1
        config.model.width, config.model.blocks = (
            width or config.model.width,
            blocks or config.model.blocks,
        )
    mesh = sharding.make_mesh(config.mesh)
    built = build.build_model(config, planned_tokenizer(config), mesh)
    programs, states = [], []
    for kind in (train_step.Trainer, _Unchecked):
        training = kind(config, built)
        abstract = training.abstract_state(), training.abstract_batch()
        programs.append(training.step_fn().lower(*abstract).compile())
        states.append(training.init())
    rng = np.random.default_rng(0)
    shape = config.train.batch_size, config.data.seq_len
    seconds = np.zeros((rounds + 1, 2))
    for i in range(rounds + 1):
        batch = {"x": rng.integers(0, 256, shape, dtype=np.int32), "valid": np.ones(shape, bool)}
        batch = jax.block_until_ready(sharding.put_batch(batch, mesh, shape[0]))
        for which in (0, 1) if i % 2 else (1, 0):
            begin = time.perf_counter()
            states[which], _ = jax.block_until_ready(programs[which](states[which], batch))
            seconds[i, which] = time.perf_counter() - begin
    seconds = seconds[1:]
    ratios = seconds[:, 0] / seconds[:, 1] - 1
    low, high = np.percentile(ratios, (25, 75))
    return {
        "parameters": sum(a.size for a in jax.tree.leaves(states[0].params)),
        "tokens": shape[0] * shape[1],
        "rounds": rounds,
        "seconds_with": [float(f(seconds[:, 0])) for f in (np.min, np.median)],
        "seconds_without": [float(f(seconds[:, 1])) for f in (np.min, np.median)],
        "ratio": float(np.median(ratios)),
        "ratio_of_minima": float(seconds[:, 0].min() / seconds[:, 1].min() - 1),
        # Of a median, from the quartiles of a normal distribution.
        "standard_error": float(1.253 * (high - low) / 1.349 / len(ratios) ** 0.5),
        "quartiles": [float(low), float(high)],
        "more_memory": int(
            programs[0].memory_analysis().temp_size_in_bytes
            - programs[1].memory_analysis().temp_size_in_bytes
        ),
    }


if __name__ == "__main__":
    print(json.dumps(finite_check_cost(), indent=2))
