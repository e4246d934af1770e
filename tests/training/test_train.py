"""Training: micro-batches, devices, dtypes, schedules; and runs that are stopped and resumed."""

import dataclasses
import json
import math
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from thorough import thorough
from tiny_run import FILE, arguments, command, make_config

from esolm_jax import train as train_lib
from esolm_jax.data import build
from esolm_jax.data.reader import TrainReader
from esolm_jax.errors import UserError
from esolm_jax.training import checkpoint_steps, metrics, optimizer, phase_loss

pytestmark = pytest.mark.fast_compile
ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_run.write_data(tmp_path_factory.mktemp("wrap"))


@pytest.fixture(scope="module")
def padded(tmp_path_factory):
    return tiny_run.write_data(tmp_path_factory.mktemp("pad"), **{"data.packing": "pad"})


def assert_identical(a, b, where=""):
    """Same pytree, same types, same bits."""
    a, b = (dict(jax.tree_util.tree_leaves_with_path(tree)) for tree in (a, b))
    assert a.keys() == b.keys()
    for path, x in a.items():
        y, name = b[path], jax.tree_util.keystr(path) + where
        assert x.dtype == y.dtype and x.shape == y.shape, name
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), name


def shaken(run):
    """Parameters far from their initialisation, where the last layer is 0 and stops gradients."""
    rng = np.random.default_rng(5)
    params = tiny_run.to_host(tiny_run.fresh_state(run).params)
    return jax.tree.map(lambda a: a + 0.3 * rng.normal(size=a.shape).astype(a.dtype), params)


def label(run, batch):
    """The phases' labelled tokens of a batch, always with the same noise."""
    draw = jax.jit(
        lambda x, valid: phase_loss.label_batch(run.training.phases, jax.random.key(1), x, valid)
    )
    return draw(batch["x"], batch["valid"])


# One step.


def test_micro_batches_sum_to_the_whole_batch(padded):
    run = train_lib.Run(make_config(padded | {"objective": "eso_b"}), pathlib.Path("unused"))
    batch = next(TrainReader(run.manifest, batch_size=8, seed=0))
    counts = batch["valid"].sum(axis=1)
    assert len(set(counts[:4])) > 1 and counts[:2].sum() != counts[2:4].sum()  # uneven
    params, labelled = shaken(run), label(run, batch)

    def compute(accumulation):
        return jax.jit(
            dataclasses.replace(run.training.objective, accumulation=accumulation).loss_and_grads
        )(params, labelled)

    losses, grads = compute(1)
    assert losses.shape == (2,)
    assert min(np.abs(leaf).max() for leaf in jax.tree.leaves(grads)) > 1e-4
    scale = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(grads))
    other_losses, other_grads = compute(2)
    np.testing.assert_allclose(other_losses, losses, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(other_grads), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * max(1.0, scale))


@pytest.mark.parametrize("objective", ["mdlm", pytest.param("eso_b", marks=thorough)])
def test_eight_devices_train_as_one(data, objective):
    """Over fsdp; test_same_numbers.py has the other objectives and meshes."""
    fields = data | {"objective": objective}
    found = {}
    for devices in (1, 8):
        states, values = tiny_run.steps(make_config(fields | {"mesh.devices": devices}), 8)
        found[devices] = [entry["loss"] for entry in values]
    assert len(set(found[1])) == 8
    np.testing.assert_allclose(found[8], found[1], rtol=1e-5)


def test_eight_devices_with_micro_batches_train_as_one_without(data):
    found = []
    for devices, accumulation in ((1, 1), (8, 2)):
        fields = {"mesh.devices": devices, "train.grad_accumulation": accumulation}
        fields |= {"objective": "mdlm"}  # all rows of the batch of 16 feed one loss
        _, values = tiny_run.steps(make_config(data | fields), 4)
        found.append([entry["loss"] for entry in values])
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5)


def test_bfloat16_is_for_computing_alone(data):
    fields = data | {"objective": "mdlm"}
    exact, wanted = tiny_run.steps(make_config(fields), 4)
    states, values = tiny_run.steps(make_config(fields | {"model.dtype": "bfloat16"}), 4)
    same = jax.tree.map(lambda a, b: a.dtype == b.dtype, states[-1], exact[-1])
    assert all(jax.tree.leaves(same))
    for tree in (states[-1].params, states[-1].ema):
        assert {a.dtype for a in jax.tree.leaves(tree)} == {np.dtype("float32")}
    floats = [a for a in jax.tree.leaves(states[-1].opt_state) if a.dtype.kind not in "iu"]
    assert floats and {a.dtype for a in floats} == {np.dtype("float32")}
    losses, wanted = ([entry["loss"] for entry in v] for v in (values, wanted))
    np.testing.assert_allclose(losses, wanted, rtol=0.02)
    assert losses != wanted


def test_dropout_changes_the_loss_and_repeats(data):
    fields = data | {"objective": "mdlm"}
    run = train_lib.Run(make_config(fields), pathlib.Path("unused"))
    params = shaken(run)

    def losses(rate):
        config = make_config(fields | {"model.dropout": rate})
        state = tiny_run.fresh_state(train_lib.Run(config, pathlib.Path("unused")))
        state = state.replace(params=params)
        return [entry["loss"] for entry in tiny_run.steps(config, 2, state)[1]]

    without, with_dropout = losses(0.0), losses(0.5)
    assert with_dropout[0] != without[0]
    assert with_dropout == losses(0.5)


def test_accumulation_gives_every_micro_batch_its_own_dropout(data):
    run = train_lib.Run(
        make_config(data | {"objective": "ar", "model.dropout": 0.5}), pathlib.Path("unused")
    )
    x = jnp.tile(jnp.arange(16, dtype=jnp.int32)[None], (2, 1))  # two equal rows
    labelled = label(run, {"x": x, "valid": jnp.ones_like(x, bool)})
    params, half = shaken(run), jax.tree.map(lambda a: a[:1], labelled)

    def loss(labelled, accumulation):
        objective = dataclasses.replace(run.training.objective, accumulation=accumulation)

        def losses(params, labelled):
            return objective.loss_and_grads(params, labelled, dropout_key=jax.random.key(3))[0]

        return float(jax.jit(losses)(params, labelled)[0])

    # Were the two micro-batches to drop the same units, their mean would be that of one alone.
    assert loss(labelled, 2) != pytest.approx(loss(half, 1), rel=1e-4)


def test_the_seed_decides_everything(data):
    first, again, other = (
        tiny_run.steps(make_config(data | {"objective": "mdlm", "seed": seed}), 3)
        for seed in (1, 1, 2)
    )
    assert_identical(first[0][-1], again[0][-1])
    assert first[1] == again[1]
    assert first[1] != other[1]
    assert first[0][0].key.tobytes() != other[0][0].key.tobytes()


def test_every_step_draws_other_noise(data):
    config = make_config(data | {"objective": "mdlm"})
    run = train_lib.Run(config, pathlib.Path("unused"))
    step_fn = run.training.step_fn()
    batch = tiny_run.put(next(TrainReader(run.manifest, batch_size=16, seed=0)), run)
    state, params = tiny_run.fresh_state(run), shaken(run)
    losses = []
    for _ in range(3):
        state, values = step_fn(state.replace(params=params), batch)
        losses.append(float(values["loss"]))
    assert len(set(losses)) == 3


# Optimizer.


@pytest.mark.parametrize(
    ("schedule", "warmup", "wanted"),
    [
        ("constant", 10, {0: 0.0, 1: 0.1, 5: 0.5, 10: 1.0, 60: 1.0, 110: 1.0}),
        ("constant", 0, {0: 1.0, 110: 1.0}),
        ("cosine", 10, {0: 0.0, 5: 0.5, 10: 1.0, 35: 0.5 + 0.5**1.5, 60: 0.5, 110: 0.0}),
        ("cosine", 0, {0: 1.0, 55: 0.5, 110: 0.0}),
    ],
)
def test_learning_rate(schedule, warmup, wanted):
    config = make_config(
        {"optimizer.schedule": schedule, "optimizer.warmup_steps": warmup,
         "optimizer.learning_rate": 0.5, "train.steps": 110}
    )  # fmt: skip
    rate = optimizer.learning_rate(config)
    for step, fraction in wanted.items():
        assert float(rate(step)) == pytest.approx(0.5 * fraction, abs=1e-6), step


@pytest.mark.parametrize(("updates", "decay"), [(1, 2 / 11), (2, 3 / 12), (9, 0.5), (90, 0.5)])
def test_average_warms_up_to_its_decay(updates, decay):
    average = optimizer.update_ema({"a": jnp.ones(2)}, {"a": jnp.zeros(2)}, 0.5, jnp.int32(updates))
    np.testing.assert_allclose(average["a"], decay, rtol=1e-6)


def test_average_follows_the_weights(data):
    config = make_config(data | {"objective": "ar"})
    start = tiny_run.fresh_state(train_lib.Run(config, pathlib.Path("unused")))
    average = np.asarray(start.params["logits"]["bias"], np.float64)
    np.testing.assert_array_equal(start.ema["logits"]["bias"], average)
    for n, state in enumerate(tiny_run.steps(config, 4)[0], start=1):
        decay = (1 + n) / (10 + n)
        average = decay * average + (1 - decay) * state.params["logits"]["bias"]
        np.testing.assert_allclose(state.ema["logits"]["bias"], average, rtol=1e-5, atol=1e-8)
        assert np.abs(state.ema["logits"]["bias"] - state.params["logits"]["bias"]).max() > 0


def test_gradients_are_clipped(data):
    config = make_config(data | {"objective": "ar"})
    run = train_lib.Run(config, pathlib.Path("unused"))
    state = tiny_run.fresh_state(run).replace(params=jax.tree.map(lambda a: 3 * a, shaken(run)))
    states, values = tiny_run.steps(config, 1, state)
    assert values[0]["grad_norm"] > 1.2  # told as it is before the clip at 1
    mean = jax.tree.leaves(states[0].opt_state[1][0].mu)  # (1 - b1) · the clipped gradient
    norm = math.sqrt(sum((a.astype(float) ** 2).sum() for a in mean))
    assert norm == pytest.approx(0.1, rel=1e-4)


@pytest.mark.parametrize("objective", ["ar", "eso_b"])
def test_loss_falls_on_a_text_that_is_easy(tmp_path, objective):
    fields = tiny_run.write_text(tmp_path / "text") | {"data.dir": str(tmp_path / "data")}
    for split in ("train", "validation", "test"):
        (tmp_path / "text" / f"{split}.jsonl").write_text(json.dumps({"text": "ab" * 600}) + "\n")
    config = make_config(fields | {"objective": objective})
    build.prepare(config, fields["data.dir"], progress=False)
    _, values = tiny_run.steps(config, 150)
    losses = [entry["loss"] for entry in values]
    assert np.mean(losses[:2]) > 3.5
    assert np.mean(losses[-10:]) < 1.2


# Stopping and resuming.

STEPS, EVERY = 40, 4
FIELDS = {
    "objective": "eso_b", "model.dropout": 0.1, "train.steps": STEPS, "train.eval_every": 6,
    "train.checkpoint_every": EVERY, "optimizer.warmup_steps": 5, "optimizer.schedule": "cosine",
}  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    config = make_config(data | FIELDS)
    tiny_run.train(config, folder)
    return folder


def read_metrics(workdir):
    """Entries without what depends on the clock."""
    return [{k: v for k, v in e.items() if k != "timing"} for e in metrics.read(workdir)]


def steps_kept(workdir):
    return {int(path.name) for path in (workdir / checkpoint_steps.FOLDER).iterdir()}


def stop_at(step: int, number: int, args) -> tuple[int, str]:
    """Trains in another process, which gets the signal once it has logged `step`."""
    (workdir,) = (arg.split("=")[1] for arg in args if arg.startswith("--workdir="))
    log = pathlib.Path(workdir, metrics.FILE)
    process = subprocess.Popen(
        [sys.executable, "-m", "esolm_jax.train", *args],
        cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    try:
        while process.poll() is None and time.monotonic() < deadline:
            if log.exists() and f'{{"step": {step},' in log.read_text():
                process.send_signal(number)
                break
            time.sleep(0.002)
        printed, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, printed


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_stopped_run_ends_like_one_that_was_not(number, data, uninterrupted, tmp_path):
    seed = random.SystemRandom().randrange(10**6)
    step = random.Random(seed).randint(2, STEPS - 12)
    where = f" (random seed {seed}: {number.name} at step {step})"
    args = [f"--workdir={tmp_path}", f"--config={FILE}", *arguments(data | FIELDS)]
    code, printed = stop_at(step, number, args)
    done = metrics.read(tmp_path)[-1]["step"]
    assert step <= done < STEPS, printed + where
    if number == signal.SIGKILL:
        assert code == -signal.SIGKILL, printed + where
    else:  # orderly: nothing is lost
        assert code == 128 + signal.SIGTERM, printed + where
        assert f"stopped at step {done}" in printed, printed + where
        assert max(steps_kept(tmp_path)) == done, where

    assert command("train", *args) == 0
    config = make_config(data | FIELDS)
    wanted, wanted_meta = tiny_run.last_checkpoint(config, uninterrupted)
    state, meta = tiny_run.last_checkpoint(config, tmp_path)
    assert int(state.step) == STEPS and meta["cursor"] == STEPS * config.train.batch_size, where
    assert_identical(state, wanted, where)
    assert meta == wanted_meta, where
    assert read_metrics(tmp_path) == read_metrics(uninterrupted), where
    assert [e["step"] for e in read_metrics(tmp_path) if "loss" in e] == [*range(1, STEPS + 1)]
    if number == signal.SIGKILL:
        assert steps_kept(tmp_path) == steps_kept(uninterrupted), where


def test_sigterm_during_validation_saves_a_checkpoint(data, tmp_path, monkeypatch):
    validate = train_lib._validate

    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return validate(*args)

    monkeypatch.setattr(train_lib, "_validate", interrupted)
    with pytest.raises(SystemExit) as end:
        tiny_run.train(make_config(data | FIELDS), tmp_path)
    assert end.value.code == 128 + signal.SIGTERM
    assert metrics.read(tmp_path)[-1]["step"] == 6
    assert steps_kept(tmp_path) == {4, 6}


def test_metrics_of_every_step(uninterrupted):
    entries = [entry for entry in metrics.read(uninterrupted) if "loss" in entry]
    names = {"step", "loss", "loss_diffusion", "loss_sequential", "grad_norm", "learning_rate"}
    assert all(entry.keys() == names | {"timing"} for entry in entries)
    for entry in entries:
        parts = entry["loss_diffusion"] + entry["loss_sequential"]
        assert entry["loss"] == pytest.approx(parts, rel=1e-6)
        assert entry["timing"].keys() == {  # a CPU has neither a known peak nor memory_stats
            "step_ms", "data_wait_ms", "tokens_per_second", "tokens_per_second_per_device",
        }  # fmt: skip
        assert 0 < entry["timing"]["data_wait_ms"] < entry["timing"]["step_ms"]
        assert entry["grad_norm"] > 0
    rates = [entry["learning_rate"] for entry in entries]
    assert rates[:6] == pytest.approx([0.0, 0.002, 0.004, 0.006, 0.008, 0.01])
    assert sorted(rates[5:], reverse=True) == rates[5:] and rates[-1] < 1e-4
    validations = [entry for entry in metrics.read(uninterrupted) if "validation_nelbo" in entry]
    assert [entry["step"] for entry in validations] == [*range(6, STEPS, 6), STEPS]
    assert validations[-1]["validation_nelbo"] < validations[0]["validation_nelbo"]


def test_finished_run_is_left_as_it_is(data, uninterrupted):
    before = (uninterrupted / metrics.FILE).read_text(), steps_kept(uninterrupted)
    tiny_run.train(make_config(data | FIELDS), uninterrupted)
    assert ((uninterrupted / metrics.FILE).read_text(), steps_kept(uninterrupted)) == before


AR = {"objective": "ar", "train.eval_every": 100}


@pytest.fixture(scope="module")
def longer(data, tmp_path_factory):
    """Losses of a run of 12 steps."""
    folder = tmp_path_factory.mktemp("longer")
    tiny_run.train(make_config(data | AR | {"train.steps": 12}), folder)
    return losses_of(folder)


def losses_of(workdir):
    return [entry["loss"] for entry in metrics.read(workdir) if "loss" in entry]


@pytest.mark.parametrize(
    ("changes", "tolerance"), [({}, 0), ({"data.workers": 1}, 0), ({"mesh.devices": 8}, 1e-5)]
)
def test_run_goes_on_with_more_steps(data, longer, tmp_path, changes, tolerance):
    tiny_run.train(make_config(data | AR | {"train.steps": 5}), tmp_path)
    tiny_run.train(make_config(data | AR | {"train.steps": 12} | changes), tmp_path)
    np.testing.assert_allclose(losses_of(tmp_path), longer, rtol=tolerance, atol=0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("optimizer.learning_rate", 0.5), ("optimizer.ema_decay", 0.5), ("seed", 1),
        ("kappa", 0.25), ("alpha_0", 0.25), ("train.batch_size", 8), ("train.grad_accumulation", 2),
        ("model.dropout", 0.3), ("model.width", 32),
    ],
)  # fmt: skip
def test_changing_what_is_fixed_is_refused(data, uninterrupted, name, value):
    before = (uninterrupted / metrics.FILE).read_text(), (uninterrupted / "config.json").read_text()
    with pytest.raises(UserError) as error:
        tiny_run.train(make_config(data | FIELDS | {name: value}), uninterrupted)
    assert str(error.value).startswith(f"config.{name}={value!r}: must be ")
    after = (uninterrupted / metrics.FILE).read_text(), (uninterrupted / "config.json").read_text()
    assert after == before
