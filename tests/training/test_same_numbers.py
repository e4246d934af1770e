"""Same numbers however a run is cut into processes, devices and mesh axes; and when it is cut anew.

Several processes are real: they compile for themselves and talk over the loopback. A single process
is this one. By default every objective has its turn, but not every mesh, cut and combination:
ESOLM_TEST_ALL=1 runs those too, and more steps, in a quarter of an hour.
"""

import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import same_numbers_run
import tiny_run
from compilation import FAST_ENVIRONMENT
from thorough import ALL
from tiny_run import FILE, arguments, command, make_config

from esolm_jax import config as config_lib
from esolm_jax import train as train_lib
from esolm_jax.data.manifest import load_data
from esolm_jax.evaluation import likelihood
from esolm_jax.evaluation.batches import eval_batches
from esolm_jax.parallel import launcher, sharding
from esolm_jax.training import checkpoint_meta, checkpoint_steps, metrics, restore

ROOT = pathlib.Path(__file__).parents[2]

OBJECTIVES = ("ar", "mdlm", "bd3", "eso_a", "eso_b")
MESHES = {
    "data=8": {"data": 8},
    "fsdp=8": {"fsdp": 8},
    "fsdp=4 tensor=2": {"fsdp": 4, "tensor": 2},
    "data=2 fsdp=2 tensor=2": {"data": 2, "fsdp": 2, "tensor": 2},
    "data=2 fsdp=2 sequence=2": {"data": 2, "fsdp": 2, "sequence": 2},
    "fsdp=2 tensor=2 sequence=2": {"fsdp": 2, "tensor": 2, "sequence": 2},
}
CUTS = ((1, 8), (2, 4), *([(4, 2)] if ALL else []))  # processes × devices of each
QUICKLY = {  # fsdp=8 is that of test_train.py
    (1, 8): (
        "ar fsdp=4 tensor=2", "bd3 data=2 fsdp=2 sequence=2", "eso_a fsdp=2 tensor=2 sequence=2",
        "eso_b data=2 fsdp=2 tensor=2", "mdlm dropout fsdp=2 tensor=2 sequence=2",
    ),
    (2, 4): ("mdlm dropout data=2 fsdp=2 tensor=2",),
}  # fmt: skip

# Of a batch of 16, Eso-LM's phases get 8 rows each; with 0.6 · 32 masks a row, a step now and then
# has a row with more than the 24 query copies that trimming leaves.
MODEL = {
    "data.seq_len": 32, "model.width": 32, "model.heads": 4, "model.blocks": 2,
    "model.cond_width": 8, "optimizer.learning_rate": 3e-3, "optimizer.warmup_steps": 10,
    "mesh.devices": 0,
}  # fmt: skip
STEPS, SHARDED_STEPS = 50, 20  # of one device; of several, which take most of their time to meet
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_run.write_data(tmp_path_factory.mktemp("same"), **{"data.seq_len": 32})


def of(objective: str, mesh: dict, **more) -> dict:
    """Fields of a config. `mesh`: sizes of axes."""
    alpha = {"alpha_0": 0.4} if objective.startswith("eso") else {}
    axes = {"data": 1} | mesh
    return (
        MODEL | alpha | {"objective": objective} | more | {f"mesh.{a}": n for a, n in axes.items()}
    )


class Processes:
    """`python ARGS` in several processes of some devices each; `args` of all or one per process."""

    def __init__(self, cut: tuple[int, int], args):
        count, devices = cut
        hidden = (*launcher.ENV_VARS, launcher.CLUSTER, "PJRT_NPROC", "XLA_FLAGS")
        base = {k: v for k, v in os.environ.items() if k not in hidden}
        base |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
        base |= FAST_ENVIRONMENT | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests/support'}"}
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{s.getsockname()[1]}"
        each = args if isinstance(args[0], list) else [args] * count
        self.all = []
        for index, args in enumerate(each):
            told = zip(launcher.ENV_VARS, (address, str(count), str(index)), strict=True)
            self.all.append(
                subprocess.Popen(
                    [sys.executable, *args], env=base | (dict(told) if count > 1 else {}),
                    stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
                )
            )  # fmt: skip

    def wait(self, timeout: float = 240):
        """[(exit code, stdout, stderr)] of all of them."""
        try:
            texts = [process.communicate(timeout=timeout) for process in self.all]
        finally:
            for process in self.all:
                process.kill()
        return [(p.returncode, *text) for p, text in zip(self.all, texts, strict=True)]

    def succeed(self, timeout: float = 240):
        for code, out, err in self.wait(timeout):
            assert code == 0, out + err


# Training on every mesh.


def jobs_of(cut) -> list[str]:
    """Such as "eso_b data=8", or "mdlm dropout data=8"."""
    if not ALL:
        return list(QUICKLY[cut])
    meshes = MESHES if cut == (1, 8) else ("data=2 fsdp=2 tensor=2", "fsdp=2 tensor=2 sequence=2")
    plain = [f"{objective} {mesh}" for objective in OBJECTIVES for mesh in meshes]
    return [*plain, *(f"{o} dropout {m}" for o in ("mdlm", "eso_b") for m in meshes)]


def train(cut, jobs: dict[str, dict], steps: int, folder: pathlib.Path) -> dict:
    if cut[0] == 1:
        jobs = {name: fields | {"mesh.devices": cut[1]} for name, fields in jobs.items()}
        return same_numbers_run.train_all(jobs, steps)
    folder.mkdir()
    out, file = folder / "out.json", folder / "jobs.json"
    file.write_text(json.dumps({"steps": steps, "jobs": jobs, "out": str(out)}))
    Processes(cut, ["tests/support/same_numbers_run.py", str(file)]).succeed(120 * len(jobs))
    return json.loads(out.read_text())


def fields_of(job: str, data: dict) -> dict:
    objective, mesh = job.split(" ", 1)
    name = mesh.removeprefix("dropout ")
    more = {"model.dropout": 0.1} if name != mesh else {}
    return data | of(objective, MESHES.get(name, {}), **more)


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    """What one device finds: "eso_b" and "eso_b dropout" → its losses."""
    names = sorted({re.sub(" [^ ]*=.*", "", job) for cut in CUTS for job in jobs_of(cut)})
    jobs = {name: fields_of(f"{name} ", data) for name in names}
    return train((1, 1), jobs, STEPS, tmp_path_factory.mktemp("alone") / "run")


def test_one_device_learns_and_trims(alone):
    for name, found in alone.items():
        losses, trimmed = found["losses"], found["trimmed"]
        assert len(losses) == STEPS and np.isfinite(losses).all()
        assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 1, name
        if name.startswith("eso"):
            assert 10 < sum(trimmed) < 45, name
            assert len(set(trimmed[:SHARDED_STEPS])) == 2, name
    assert len({found["losses"][20] for found in alone.values()}) == len(alone)


@pytest.mark.parametrize("cut", CUTS, ids=lambda cut: "{}x{}".format(*cut))
def test_same_losses(data, alone, tmp_path, cut):
    jobs, steps = jobs_of(cut), STEPS if ALL and cut[0] == 1 else SHARDED_STEPS
    found = train(cut, {job: fields_of(job, data) for job in jobs}, steps, tmp_path / "run")
    far = {}
    for job in jobs:
        assert found[job]["mesh"].startswith("8 cpu devices (")
        assert ("in " in found[job]["mesh"]) == (cut[0] > 1)
        losses = np.array(found[job]["losses"])
        assert len(losses) == steps
        wanted = np.array(alone[re.sub(" [^ ]*=.*", "", job)]["losses"][:steps])
        far[job] = float(np.max(np.abs(losses / wanted - 1)))
    print({job: f"{error:.1e}" for job, error in far.items()})
    assert all(error < TOLERANCE for error in far.values()), far


# A state is born sharded.


@pytest.mark.parametrize(
    "mesh", ["fsdp=4 tensor=2", *(["fsdp=8", "data=2 fsdp=2 tensor=2"] if ALL else [])]
)
def test_state_is_born_sharded(data, mesh):
    sizes = {"fsdp": 1, "tensor": 1} | MESHES[mesh]
    run = train_lib.Run(make_config(data | of("eso_b", sizes)), pathlib.Path("unused"))
    training = run.training
    compiled = jax.jit(training._make_state, out_shardings=training.shardings).lower().compile()
    text, state = compiled.as_text(), training.init()
    mu, nu = (getattr(state.opt_state[1][0], name) for name in ("mu", "nu"))
    parts = {  # how many parts a parameter is in, written down by hand
        "blocks/qkv/kernel": sizes["fsdp"] * sizes["tensor"],
        "blocks/attention_out/kernel": sizes["fsdp"] * sizes["tensor"],
        "blocks/mlp_in/kernel": sizes["fsdp"] * sizes["tensor"],
        "blocks/mlp_in/bias": sizes["tensor"],
        "blocks/mlp_out/kernel": sizes["fsdp"] * sizes["tensor"],
        "blocks/modulation/linear/kernel": sizes["fsdp"],
        "final_modulation/linear/kernel": sizes["fsdp"],
        "embedding/embedding": sizes["fsdp"] * sizes["tensor"],
        "logits/kernel": sizes["fsdp"] * sizes["tensor"],
        "logits/bias": sizes["tensor"],
    }
    for tree in (state.params, state.ema, mu, nu):
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            name = "/".join(key.key for key in path)
            held = {shard.data.size for shard in leaf.addressable_shards}
            assert held == {leaf.size // parts.get(name, 1)}, name
            indices = {str(shard.index) for shard in leaf.addressable_shards}
            assert len(indices) == parts.get(name, 1), name
            if len(indices) > 1:  # not even on the way
                assert f"f32[{','.join(map(str, leaf.shape))}]" not in text, name


# Through the verbs: stopped, cut anew, continued.

MORE = 8  # steps after the stop
LATE = {
    "train.eval_every": 10**6, "train.checkpoint_every": 10**6, "optimizer.warmup_steps": 0,
}  # fmt: skip
RESTARTS = {  # cut → mesh that the run goes on with
    (2, 4): {"data": 2, "fsdp": 2, "tensor": 2},
    (1, 8): {"fsdp": 4, "tensor": 2},
    (4, 1): {"fsdp": 2, "sequence": 2},
    (2, 2): {"fsdp": 2, "sequence": 2},
    (1, 1): {},
}


def verb(name: str, cut, workdir, fields: dict) -> Processes:
    args = ["-u", "-m", f"esolm_jax.{name}", f"--workdir={workdir}", f"--config={FILE}"]
    return Processes(cut, [*args, *arguments(fields)])


def train_to_the_end(cut, workdir, fields: dict) -> None:
    """By the verb; a single process is this one."""
    if cut[0] > 1:
        verb("train", cut, workdir, fields).succeed()
        return
    args = arguments(fields | {"mesh.devices": cut[1]})
    assert command("train", f"--workdir={workdir}", f"--config={FILE}", *args) == 0


def losses(workdir) -> list[float]:
    entries = [entry for entry in metrics.read(workdir) if "loss" in entry]
    assert [entry["step"] for entry in entries] == [*range(1, len(entries) + 1)]
    return [entry["loss"] for entry in entries]


@pytest.fixture(scope="module", params=["mdlm", *(["eso_b", "ar"] if ALL else [])])
def objective(request):
    return request.param


@pytest.fixture(scope="module")
def stopped(data, objective, tmp_path_factory):
    """A run of 2 x 4, of which one process got SIGTERM."""
    workdir = tmp_path_factory.mktemp(objective) / "stopped"
    fields = data | LATE | of(objective, RESTARTS[2, 4], **{"train.steps": 10**6})
    processes, log = verb("train", (2, 4), workdir, fields), workdir / metrics.FILE
    try:
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline and processes.all[0].poll() is None:
            if log.exists() and '{"step": 3,' in log.read_text():
                processes.all[1].send_signal(signal.SIGTERM)
                break
            time.sleep(0.01)
    finally:
        ends = processes.wait()
    assert [code for code, _, _ in ends] == [128 + signal.SIGTERM] * 2, ends
    done = len(losses(workdir))
    assert done >= 3
    assert f"stopped at step {done}" in ends[0][1]
    assert "stopped" not in ends[1][1]  # only process 0 prints
    assert [path.name for path in (workdir / checkpoint_steps.FOLDER).iterdir()] == [str(done)]
    assert checkpoint_meta.read_meta(workdir)["cursor"] == done * 16
    return workdir


@pytest.fixture(scope="module")
def whole(data, objective, stopped, tmp_path_factory):
    """A run of one device that nothing happened to, MORE steps longer than the stopped one."""
    workdir, steps = tmp_path_factory.mktemp(objective) / "whole", len(losses(stopped)) + MORE
    fields = data | LATE | of(objective, {}, **{"train.steps": steps})
    train_to_the_end((1, 1), workdir, fields)
    assert len(losses(workdir)) == steps
    return workdir


@pytest.mark.parametrize(
    "cut", RESTARTS if ALL else [(2, 2), (1, 1)], ids=lambda cut: "{}x{}".format(*cut)
)
def test_stopped_run_goes_on_however_it_is_cut(data, objective, whole, stopped, tmp_path, cut):
    workdir, done = tmp_path / "anew", len(losses(stopped))
    shutil.copytree(stopped, workdir)
    fields = data | LATE | of(objective, RESTARTS[cut], **{"train.steps": done + MORE})
    train_to_the_end(cut, workdir, fields)
    found, wanted = losses(workdir), losses(whole)
    assert found[:done] == losses(stopped) and len(found) == done + MORE
    np.testing.assert_allclose(found, wanted, rtol=TOLERANCE)
    nelbos = [metrics.read(folder)[-1]["validation_nelbo"] for folder in (workdir, whole)]
    np.testing.assert_allclose(*nelbos, rtol=TOLERANCE)


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_weights_alone_are_read_on_one_device(objective, stopped, tmp_path, weights):
    """What 8 devices in 2 processes saved, without the optimizer's state and the other weights."""
    workdir = tmp_path / "weights"
    shutil.copytree(stopped, workdir)
    (step,) = (workdir / checkpoint_steps.FOLDER).iterdir()
    for item in ("optimizer", "params" if weights == "ema" else "ema"):
        shutil.rmtree(step / item)
    axes = {f"mesh.{axis}": 1 for axis in ("data", "fsdp", "tensor", "sequence", "devices")}
    one = [f"--workdir={workdir}", *(f"--config.{name}={value}" for name, value in axes.items())]
    assert command("evaluate", *one, f"--config.eval.weights={weights}") == 0
    found = json.loads((workdir / "evaluate.json").read_text())
    assert found["weights"] == weights and found["step"] == int(step.name)
    config = make_config(
        {**config_lib.flat(checkpoint_meta.saved_config(workdir)), "mesh.devices": 8}
    )
    mesh = sharding.make_mesh(config.mesh)
    trained = restore.load_trained(config, stopped, weights, mesh)
    batches = eval_batches(
        config, load_data(config, stopped), "test", config.eval.max_windows, mesh
    )
    wanted = likelihood.make_nelbo(config, trained.built)(
        trained.params, batches, num_samples=2, seed=config.seed
    )
    assert found["results"][0]["nll_per_token"] == pytest.approx(wanted.nll, rel=TOLERANCE)
    if weights == "ema":
        assert command("sample", *one) == 0
        lines = (workdir / "samples.jsonl").read_text().splitlines()
        texts = np.array([json.loads(line)["token_ids"] for line in lines])
        assert texts.shape == (2, 32) and texts.min() >= 0 and texts.max() < 259


# What must not happen.


def test_configs_that_differ_are_one_error_on_every_host(data, tmp_path):
    common = ["-m", "esolm_jax.train", f"--workdir={tmp_path / 'run'}", f"--config={FILE}"]
    common += arguments(data | of("ar", {"data": 8}))
    ends = Processes((2, 4), [common, [*common, "--config.seed=1"]]).wait()
    assert [code for code, _, _ in ends] == [2, 2]
    assert ends[0][2] == ends[1][2]
    pattern = r"error: config differs between hosts: (\w{12}) on process 0, (\w{12}) on process 1\n"
    assert re.fullmatch(pattern, ends[0][2]), ends[0][2]
    assert not (tmp_path / "run").exists()
