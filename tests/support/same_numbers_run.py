"""Trains job after job without files, as `train` would, for test_same_numbers.py.

One of several processes is

python tests/support/same_numbers_run.py JOBS.json, where JOBS.json holds {"steps": steps of each
job, "jobs": {name: config fields}, "out": file for what process 0 saw, also JSON}. The environment
says which process it is, and of how many (parallel/launcher.py).
"""

import contextlib
import json
import pathlib
import sys

import jax
from tiny_run import fresh_state, make_config

from esolm_jax import train as train_lib
from esolm_jax.data.reader import TrainReader
from esolm_jax.family import trim
from esolm_jax.parallel import distributed, sharding
from esolm_jax.parallel.guard import guard
from esolm_jax.training import phase_loss, train_step


def train(run: train_lib.Run, steps: int) -> dict:
    """The loss of every step, and on one device whether the step trimmed its query copies."""
    config, mesh = run.config, run.built.mesh
    size = config.train.batch_size
    step_fn, state = run.training.step_fn(), fresh_state(run)
    rows = sharding.local_rows(mesh, size)
    reader = TrainReader(run.manifest, batch_size=size, rows=rows, seed=config.seed)
    watched = mesh.size == 1 and run.training.objective.queries[-1] is not None
    is_trimmed = trimming(run.training) if watched else lambda *args: False
    losses, trimmed = [], []
    with contextlib.closing(reader):
        for _ in range(steps):
            batch = sharding.put_batch(next(reader), mesh, size)
            trimmed.append(bool(is_trimmed(state, batch)))
            state, metrics = step_fn(state, batch)
            losses.append(float(metrics["loss"]))
    return {"losses": losses, "trimmed": trimmed}


def trimming(training: train_step.Trainer):
    """(state, batch) → whether Training.step will trim: its noise, drawn here once more."""

    @jax.jit
    def is_trimmed(state, batch):
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        noise_key, _ = jax.random.split(key)
        labelled = phase_loss.label_batch(training.phases, noise_key, batch["x"], batch["valid"])
        return trim.fits(labelled[-1], training.objective.queries[-1])

    return is_trimmed


def train_all(jobs: dict[str, dict], steps: int) -> dict[str, dict]:
    """What train() returns, and the mesh, by name. `jobs`: config fields by name."""
    found = {}
    for name, fields in jobs.items():
        run = train_lib.Run(make_config(fields), pathlib.Path("unused"))
        found[name] = train(run, steps) | {"mesh": sharding.describe(run.built.mesh)}
        jax.clear_caches()  # thirty compiled steps are gigabytes
    return found


def main(jobs: dict) -> None:
    with guard():
        distributed.start(init_timeout=60, heartbeat_timeout=60, barrier_timeout=60)
        found = train_all(jobs["jobs"], jobs["steps"])
        if distributed.is_main():
            pathlib.Path(jobs["out"]).write_text(json.dumps(found))


if __name__ == "__main__":
    main(json.loads(pathlib.Path(sys.argv[1]).read_text()))
