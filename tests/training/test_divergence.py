"""Training that diverges: non-finite steps are not counted, saved or read."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_run
from tiny_run import FILE, arguments, command, make_config

from esolm_jax import train as train_lib
from esolm_jax.data.reader import TrainReader
from esolm_jax.training import (
    checkpoint,
    checkpoint_steps,
    health,
    metrics,
    optimizer,
    phase_loss,
)

pytestmark = pytest.mark.fast_compile

LOSS, GRADIENT = 200, 201  # bytes that are in no text: a batch of them has no finite loss, gradient
MESH = {"devices": 8, "data": 2, "fsdp": 2, "tensor": 2}
MESHES = {
    "one device": {},
    "a mesh": {f"mesh.{name}": size for name, size in MESH.items()}
    | {"train.grad_accumulation": 2},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_run.write_data(tmp_path_factory.mktemp("data"), objective="ar")


class Fragile:
    """An objective that breaks on some batches."""

    def __init__(self, objective):
        self._objective = objective

    def __getattr__(self, name):
        return getattr(self._objective, name)

    def loss_and_grads(self, params, labelled, dropout_key=None):
        losses, grads = self._objective.loss_and_grads(params, labelled, dropout_key)

        def seen(token):
            return jnp.any(jnp.stack([jnp.any(part.target == token) for part in labelled]))

        bias = grads["logits"]["bias"]
        grads["logits"]["bias"] = bias.at[0].set(jnp.where(seen(GRADIENT), jnp.inf, bias[0]))
        return losses.at[0].set(jnp.where(seen(LOSS), jnp.nan, losses[0])), grads


# One step.


def run_steps(fields, *kinds):
    """States (numpy) after a step each on a batch of text (None) or of the byte `kind`."""
    run = train_lib.Run(make_config(fields), None)
    run.training.objective = Fragile(run.training.objective)
    step_fn, state = run.training.step_fn(), tiny_run.fresh_state(run)
    reader = TrainReader(run.manifest, batch_size=run.config.train.batch_size, seed=0)
    states, values = [], []
    for kind in kinds:
        batch = next(reader)
        if kind is not None:
            batch = batch | {"x": np.full_like(batch["x"], kind)}
        state, found = step_fn(state, tiny_run.put(batch, run))
        states.append(tiny_run.to_host(state))
        values.append({name: float(value) for name, value in found.items()})
    reader.close()
    return states, values


def saved(state):
    """What a step changes but for the step, by name, as bytes."""
    tree = {"params": state.params, "ema": state.ema, "optimizer": state.opt_state}
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): leaf.tobytes() for path, leaf in leaves}


def counts(state):
    h = state.health
    return int(state.step), int(h.first_bad), int(h.in_a_row), int(h.skipped)


@pytest.mark.parametrize("mesh", MESHES)
def test_a_skipped_step_changes_nothing_but_the_counts(data, mesh):
    fields = data | MESHES[mesh] | {"train.on_non_finite": "skip"}
    states, values = run_steps(fields, None, LOSS, GRADIENT, None)
    assert [counts(state) for state in states] == [
        (1, 0, 0, 0),
        (2, 2, 1, 1),
        (3, 2, 2, 2),
        (4, 0, 0, 2),
    ]
    first, second, third, fourth = map(saved, states)
    assert first == second == third
    assert all(fourth[name] != first[name] for name in first if "bias" in name)
    assert np.isnan(values[1]["loss"]) and np.isfinite(values[1]["grad_norm"])
    assert np.isinf(values[2]["grad_norm"]) and np.isfinite(values[2]["loss"])
    for leaf in jax.tree.leaves(states):
        assert np.isfinite(leaf).all()


def test_after_a_step_that_ends_the_run_no_step_counts(data):
    states, _ = run_steps(data, None, GRADIENT, None)
    assert counts(states[2])[:2] == (3, 2)
    assert saved(states[0]) == saved(states[1]) == saved(states[2])
    config = make_config(data)
    assert not health.fault(states[0].health, config)
    assert health.fault(states[2].health, config).startswith("step 2: the loss, a gradient or")


@pytest.mark.parametrize("worst", [1e38, -1e38, np.inf, np.nan])
def test_weights_whose_differences_overflow_are_not_finite(worst):
    params = {"a": jnp.ones(3), "b": jnp.array([8e37, -8e37])}
    assert health.are_bounded(params)
    assert not health.are_bounded(params | {"c": jnp.array([0, worst], jnp.float32)})


def assert_equal(tree, expected, **tolerance):
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), tree, expected)


def test_updates_are_those_of_adamw_or_nothing():
    """Twelve steps, of which every third does not count, against optax without those steps."""
    config = make_config({"optimizer.warmup_steps": 5})
    o = config.optimizer
    adamw = optax.adamw(
        optimizer.learning_rate(config), b1=o.b1, b2=o.b2, eps=o.eps, weight_decay=o.weight_decay
    )
    plain = optax.chain(optax.clip_by_global_norm(o.clip_norm), adamw)
    ours = optimizer.make(config)
    rng = np.random.default_rng(0)
    params = {"a": jnp.asarray(rng.normal(size=(3, 4)), jnp.float32), "b": jnp.ones(5)}
    ours_state, plain_state = ours.init(params), plain.init(params)
    assert_equal(ours_state, plain_state)
    for step in range(12):
        scale = 10.0 ** rng.uniform(-4, 2)
        grads = jax.tree.map(lambda a, s=scale: jnp.float32(s * rng.normal(size=a.shape)), params)
        if step % 3 == 2:
            bad = jax.tree.map(lambda g, n=step: np.where(n < 6, np.nan, np.inf) + g, grads)
            updates, skipped = ours.update(bad, ours_state, params, counts=False)
            assert_equal(skipped, ours_state)
            assert all(not u.any() for u in jax.tree.leaves(updates))
            continue
        updates, ours_state = ours.update(grads, ours_state, params, counts=True)
        expected, plain_state = plain.update(grads, plain_state, params)
        assert_equal((updates, ours_state), (expected, plain_state), rtol=3e-5)
        params = optax.apply_updates(params, expected)


def test_adam_cannot_grow_a_weight_by_more_than_its_bound():
    """Adam's worst case: gradients that grow by a factor, so that v̂ stays behind m̂²."""
    config = make_config({})
    config.optimizer.update({"learning_rate": 1.0, "warmup_steps": 0, "weight_decay": 0.0})
    config.train.steps = 60
    bound = optimizer.largest_growth(config)
    for factor in (1.0, 1.11, 1.5, 10.0):
        adam = optax.adam(1.0, b1=config.optimizer.b1, b2=config.optimizer.b2)
        state, weight = adam.init(jnp.zeros(())), 0.0
        for step in range(config.train.steps):
            update, state = adam.update(jnp.float32(1e-15 * factor ** min(step, 30)), state)
            weight += abs(float(update))
        assert 0 < weight <= bound
    config.optimizer.b2 = config.optimizer.b1**2
    assert optimizer.largest_growth(config) == np.inf


def test_a_step_whose_weights_overflow_is_skipped(data):
    """With a learning rate that can overflow them, new weights are examined."""
    fields = data | {"train.on_non_finite": "skip", "optimizer.learning_rate": 1e38}
    states, _ = run_steps(fields | {"optimizer.warmup_steps": 0}, None)
    assert counts(states[0]) == (1, 1, 1, 1)


# Runs.

STEPS = {"train.steps": 6, "train.log_every": 6, "train.eval_every": 2, "train.keep_last": 1}
SKIP = {"train.on_non_finite": "skip"}


@pytest.fixture
def bad(monkeypatch):
    """The batches that are not text, by their step; fill it."""
    kinds: dict[int, int] = {}
    make = phase_loss.make_objective

    class Reader(TrainReader):
        def __next__(self):
            batch = super().__next__()
            kind = kinds.get(self.cursor // len(batch["x"]))
            return batch if kind is None else batch | {"x": np.full_like(batch["x"], kind)}

    monkeypatch.setattr(train_lib, "TrainReader", Reader)
    monkeypatch.setattr(phase_loss, "make_objective", lambda *args: Fragile(make(*args)))
    return kinds


def train(workdir, fields):
    return command("train", f"--config={FILE}", f"--workdir={workdir}", *arguments(fields))


def last_line(capsys):
    return capsys.readouterr().err.strip().splitlines()[-1]


def steps_in(workdir):
    return {int(path.name) for path in (workdir / checkpoint_steps.FOLDER).iterdir()}


def entries(workdir):
    """Of metrics.jsonl, which is strict JSON."""

    def refuse(constant):
        raise AssertionError(constant)

    lines = (workdir / metrics.FILE).read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def test_a_run_that_diverges_ends_and_keeps_the_good_checkpoint(data, bad, tmp_path, capsys):
    bad[5] = LOSS
    fields = data | STEPS | {"train.keep_best": 0}
    assert train(tmp_path / "run", fields) == 2
    told = last_line(capsys)
    assert told.startswith("error: step 5: the loss, a gradient or a new weight is NaN or infinity")
    assert told.endswith(f"ended at step 6; last good checkpoint: {tmp_path}/run/checkpoints/4")
    assert "learning_rate" in told and "--config.train.on_non_finite=skip" in told
    assert steps_in(tmp_path / "run") == {4}
    assert command("evaluate", f"--workdir={tmp_path}/run", *arguments({"mesh.devices": 1})) == 0
    # Skipping goes on, and counts over resumptions.
    assert train(tmp_path / "run", fields | SKIP) == 0
    assert "skipped steps (not finite): 1\n" in capsys.readouterr().out
    bad[7] = GRADIENT
    assert train(tmp_path / "run", fields | SKIP | {"train.steps": 8}) == 0
    found = {e["step"]: e["skipped_steps"] for e in entries(tmp_path / "run") if "loss" in e}
    assert found == {6: 1, 8: 2}
    config = make_config(fields | SKIP | {"train.steps": 8})
    assert counts(tiny_run.last_checkpoint(config, tmp_path / "run")[0]) == (8, 0, 0, 2)


def test_a_run_that_diverges_at_once_has_no_checkpoint(data, bad, tmp_path, capsys):
    bad[1] = GRADIENT
    assert train(tmp_path / "run", data | STEPS) == 2
    told = last_line(capsys)
    assert told.startswith("error: step 1: ") and told.endswith("last good checkpoint: none")
    assert steps_in(tmp_path / "run") == set()


def test_many_skipped_steps_in_a_row_end_the_run(data, bad, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(health, "MAX_IN_A_ROW", 2)
    bad |= dict.fromkeys([1, 3, 4, 5, 6], LOSS)
    assert train(tmp_path / "run", data | STEPS | SKIP) == 2
    told = last_line(capsys)
    assert told.startswith("error: steps 3 to 4: all skipped, because the loss, a gradient or a")
    assert told.endswith("last good checkpoint: " + f"{tmp_path}/run/checkpoints/2")


def test_a_nelbo_that_is_not_finite_is_told_and_ranks_last(data, tmp_path, capsys, monkeypatch):
    nelbos = {2: 5.0, 4: 3.0}
    monkeypatch.setattr(
        train_lib, "_validate", lambda run, _, state: {"nelbo": nelbos.get(int(state.step), np.nan)}
    )
    fields = data | STEPS | {"train.keep_best": 1, "train.steps": 10}
    assert train(tmp_path / "run", fields) == 0
    assert "the NELBO at step 10 is nan, although all weights are" in capsys.readouterr().out
    assert steps_in(tmp_path / "run") == {4, 10}
    found = [e["validation_nelbo"] for e in entries(tmp_path / "run") if "validation_nelbo" in e]
    assert found == [5.0, 3.0, None, None, None]


# Weights that are not finite, in checkpoints of earlier versions.


@pytest.fixture(scope="module")
def broken(data, tmp_path_factory):
    """broken(*parts): a workdir whose checkpoint has NaN in these parts of the state."""
    run = train_lib.Run(make_config(data), None)
    state = tiny_run.to_host(tiny_run.fresh_state(run))

    def spoil(tree):
        def at(path, leaf):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            return np.full_like(leaf, np.nan) if name.endswith("qkv/kernel") else leaf

        return jax.tree.map_with_path(at, tree)

    def make(*parts):
        workdir = tmp_path_factory.mktemp("broken")
        checkpoints = checkpoint.Checkpoints(workdir, keep_last=1, keep_best=0)
        spoilt = state.replace(**{part: spoil(getattr(state, part)) for part in parts})
        checkpoints.save(spoilt.replace(step=np.int32(4)), run.meta(4, 0, 0))
        checkpoints.close()
        (workdir / "tokenizer").mkdir()
        run.manifest.load_tokenizer().save(workdir / "tokenizer")
        return workdir

    return make


def refused(capsys, verb, *args):
    capsys.readouterr()
    assert command(verb, *map(str, args)) == 2
    return last_line(capsys)


def test_no_verb_takes_weights_that_are_not_finite(broken, data, tmp_path, capsys):
    workdir = broken("params", "ema")
    told = f"{workdir}/checkpoints/4/ema: tensor blocks/qkv/kernel holds NaN or infinity (1 of"
    given, one = f"--workdir={workdir}", "--config.mesh.devices=1"
    assert told in refused(capsys, "evaluate", given, one)
    assert told in refused(capsys, "sample", given, one)
    assert told in refused(capsys, "export", given, f"--to={tmp_path}/out", one)
    assert told in refused(capsys, "convert", given, f"--to={tmp_path}/out.safetensors", one)
    raw = refused(capsys, "evaluate", given, one, "--config.eval.weights=raw")
    assert told.replace("/ema", "/params") in raw
    fields = data | {"init_from": str(workdir)}
    new = refused(capsys, "train", f"--config={FILE}", f"--workdir={tmp_path}/new",
                  *arguments(fields))  # fmt: skip
    assert "config.init_from=" in new and "tensor blocks/qkv/kernel holds NaN" in new
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("part", ["params", "ema", "opt_state"])
def test_no_run_is_resumed_from_a_state_that_is_not_finite(broken, data, capsys, part):
    workdir = broken(part)
    told = refused(capsys, "train", f"--config={FILE}", f"--workdir={workdir}", *arguments(data))
    assert f"{workdir}/checkpoints/4: tensor {part.replace('opt_state', 'optimizer')}/" in told
    assert "qkv/kernel holds NaN" in told
    assert steps_in(workdir) == {4}
