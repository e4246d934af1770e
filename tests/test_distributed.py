"""Real processes: they agree or say how not, stop at one step, and end when one is lost."""

import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time

import jax
import ml_collections
import pytest

from esolm_jax import distributed
from esolm_jax.errors import UserError

ROOT = str(pathlib.Path(__file__).parents[1])

# What all scripts begin with; a UserError outside guard() ends as it does in the command line.
PREAMBLE = """
import os, signal, sys, time
from esolm_jax import distributed
from esolm_jax.errors import UserError

def main(body, **settings):
    settings = dict(init_timeout=30, heartbeat_timeout=10, barrier_timeout=10) | settings
    try:
        with distributed.guard():
            distributed.start(**settings)
            body(distributed.process_index())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)

def train(stop=None, steps=500, at_step=lambda step: None):
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec
    mesh = Mesh(np.array(jax.devices()), ("data",))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    x = jax.make_array_from_callback((mesh.size,), rows, lambda index: np.ones(1, np.float32))
    total = jax.jit(jnp.sum, out_shardings=NamedSharding(mesh, PartitionSpec()))
    for step in range(1, steps + 1):
        assert float(total(x)) == jax.process_count()
        at_step(step)
        if stop and (number := stop.after(step)):
            print("stopped after", step, number, flush=True)
            sys.exit(128 + number)
        time.sleep(0.02)
"""


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Processes:
    """The script, run by as many processes as there are `indices`, told to be so many."""

    def __init__(self, script, *, count=2, indices=None, port=None, **environment):
        address = f"127.0.0.1:{port or free_port()}"
        hidden = ("XLA_FLAGS", *distributed.TOLD_BY)
        base = {k: v for k, v in os.environ.items() if k not in hidden}
        base |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": ROOT, "JAX_NUM_PROCESSES": str(count)}
        self.address, self.begin = address, time.time()
        self.all = [
            subprocess.Popen(
                [sys.executable, "-u", "-c", PREAMBLE + textwrap.dedent(script)],
                env=base
                | {"JAX_COORDINATOR_ADDRESS": address, "JAX_PROCESS_ID": str(index)}
                | environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for index in (range(count) if indices is None else indices)
        ]

    def wait(self):
        """[(exit code, stdout, stderr)] of all of them."""
        try:
            texts = [process.communicate(timeout=60) for process in self.all]
        finally:
            for process in self.all:
                process.kill()
        return [(p.returncode, *text) for p, text in zip(self.all, texts, strict=True)]


def test_processes_meet_agree_and_part():
    script = """
    def body(index):
        assert distributed.process_count() == 2
        assert distributed.is_main() == (index == 0)
        for _ in range(2):
            distributed.barrier("again", timeout=10)
            distributed.check_same({"config": "c", "code version": "v"}, timeout=10)
        train(steps=3)
        assert (index == 0) == distributed.is_main()
        print("done", index)
    main(body)
    """
    for index, (code, out, err) in enumerate(Processes(script).wait()):
        assert code == 0, err
        assert f"done {index}" in out and "error" not in err.lower()


def test_disagreement_is_the_same_error_everywhere():
    script = """
    def body(index):
        distributed.check_same({"config": f"c{index % 2}", "code version": "v"}, timeout=10)
    main(body)
    """
    wanted = "error: config differs between hosts: c0 on processes 0, 2, c1 on process 1\n"
    for code, out, err in Processes(script, count=3).wait():
        assert (code, out, err) == (2, "", wanted)


def test_an_error_of_one_process_ends_the_others():
    """The one that failed exits by its own code; the other, which waits for it, says why."""
    script = """
    def body(index):
        if index == 1:
            raise UserError("no such file")
        distributed.barrier("never", timeout=50)
    main(body)
    """
    processes = Processes(script)
    (code_0, _, err_0), (code_1, _, err_1) = processes.wait()
    assert (code_1, err_1) == (2, "error: no such file\n")
    assert (code_0, err_0) == (1, "error: process 0 lost a peer: process 1: no such file\n")
    assert time.time() - processes.begin < 20


def test_barrier_that_not_all_reach():
    script = """
    def body(index):
        if index == 0:
            distributed.barrier("save", timeout=0.5)
        time.sleep(30)
    main(body)
    """
    (code_0, _, err_0), (code_1, _, err_1) = Processes(script).wait()
    message = (
        "process 0: not all 2 processes came to 'save' within 0.5 s "
        "(config.distributed.barrier_timeout)"
    )
    assert (code_0, err_0) == (2, f"error: {message}\n")
    assert code_1 == 1 and f"error: process 1 lost a peer: process 0: {message}" in err_1


@pytest.mark.parametrize("victim", [0, 1])
def test_killed_peer_ends_the_others(victim):
    script = f"""
    def body(index):
        def at_step(step):
            if step == 5 and index == {victim}:
                print("killed at", time.time())
                os.kill(os.getpid(), signal.SIGKILL)
        train(at_step=at_step)
    main(body)
    """
    processes = Processes(script)
    results = processes.wait()
    code, _, err = results[1 - victim]
    killed = float(re.search(r"killed at (\S+)", results[victim][1])[1])
    assert results[victim][0] == -signal.SIGKILL
    if victim == 0:  # JAX's own thread, which aborts when the coordinator is gone, may be faster
        assert code in (1, -signal.SIGABRT)
        assert "lost a peer" in err or "This most likely indicates that another task died" in err
    else:
        assert code == 1
        (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
        assert line.startswith("error: process 0 lost a peer, which said nothing (process 0: ")
    assert time.time() - killed < 8


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_process_stops_all_after_the_same_step(number):
    script = f"""
    def body(index):
        def at_step(step):
            if step == 5 and index == 1:
                os.kill(os.getpid(), {int(number)})
        train(distributed.StopSignal(), at_step=at_step)
    main(body, stoppable=True)
    """
    results = Processes(script).wait()
    steps = [int(re.search(r"stopped after (\d+)", out)[1]) for _, out, _ in results]
    assert steps[0] == steps[1] >= 5
    assert [code for code, _, _ in results] == [128 + signal.SIGTERM, 128 + number]


def test_nobody_there():
    script = "main(lambda index: None, init_timeout=2)"
    port = free_port()
    lonely = Processes(script, indices=[1], port=port)
    first = Processes(script, indices=[0])
    with socket.socket(socket.AF_INET6) as taken:
        taken.bind(("", 0))
        taken.listen()
        busy = Processes(script, indices=[0], port=taken.getsockname()[1])
        ((code_2, _, err_2),) = busy.wait()
    ((code_1, _, err_1),) = lonely.wait()
    ((code_0, _, err_0),) = first.wait()
    assert (code_0, code_1, code_2) == (2, 2, 2)
    assert err_1 == (
        f"error: process 1: no coordinator (process 0) answers at 127.0.0.1:{port} within 2 s "
        "(config.distributed.init_timeout)\n"
    )
    assert err_0 == (
        f"error: process 0: not all 2 processes came to the coordinator at {first.address} "
        "within 2 s (config.distributed.init_timeout)\n"
    )
    assert err_2 == (
        f"error: JAX_COORDINATOR_ADDRESS={busy.address}: the port is in use on this host\n"
    )
    assert time.time() - lonely.begin < 15


def test_environment_of_a_launcher(monkeypatch):
    whole = dict(zip(distributed.TOLD_BY, ("host:1234", "4", "3"), strict=True))
    assert distributed._told({}) is None
    assert distributed._told(whole) == {
        "coordinator_address": "host:1234",
        "num_processes": 4,
        "process_id": 3,
        "cluster_detection_method": "deactivate",
    }
    for name in distributed.TOLD_BY:
        part = {k: v for k, v in whole.items() if k != name}
        with pytest.raises(UserError, match=f"^{name}: missing from the environment"):
            distributed._told(part)
    for name, bad in zip(distributed.TOLD_BY, ("host", "0", "4"), strict=True):
        with pytest.raises(UserError, match=f"{name}={bad}: must"):
            distributed._told(whole | {name: bad})


SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}


@pytest.mark.parametrize(
    "environment, several",
    [
        ({}, False),
        (SLURM, True),
        (SLURM | {"SLURM_NTASKS": "1"}, False),
        ({k: v for k, v in SLURM.items() if k != "SLURM_STEP_NODELIST"}, False),  # without srun
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "t-0,t-1"}, True),
        ({"TPU_WORKER_HOSTNAMES": "t-0", "MEGASCALE_NUM_SLICES": "2"}, True),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "ESOLM_CLUSTER": "1"}, True),
        ({"OMPI_MCA_orte_hnp_uri": "1.0;tcp://h:1", "OMPI_COMM_WORLD_SIZE": "2"}, True),
    ],
)
def test_clusters_are_known_by_their_environment(environment, several):
    assert distributed._in_cluster(environment) == several


def test_one_process(monkeypatch):
    """Nothing to join: every call does nothing, and errors pass through guard()."""
    for name in (*distributed.TOLD_BY, distributed.CLUSTER):
        monkeypatch.delenv(name, raising=False)
    timeouts = dict(init_timeout=1, heartbeat_timeout=1, barrier_timeout=1)
    distributed.start(**timeouts, stoppable=True)
    assert not jax.distributed.is_initialized()
    assert (distributed.process_index(), distributed.process_count()) == (0, 1)
    assert distributed.is_main()
    distributed.barrier("x", timeout=1)
    distributed.check_same({"config": "x"}, timeout=1)
    with pytest.raises(UserError, match="mine"):
        with distributed.guard():
            raise UserError("mine")
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    with pytest.raises(UserError, match="one of the 4 hosts of a TPU slice: set ESOLM_CLUSTER=1"):
        distributed.start(**timeouts)


def test_stop_signal_of_one_process():
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        stop = distributed.StopSignal()
        assert stop.after(1) is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.after(2) == signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # a second one ends it
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_hashes():
    make = lambda **kw: ml_collections.ConfigDict({"a": {"b": 1}, "c": 0.5} | kw)  # noqa: E731
    one = distributed.config_hash(make())
    assert re.fullmatch(r"[0-9a-f]{12}", one)
    assert one == distributed.config_hash(ml_collections.ConfigDict({"c": 0.5, "a": {"b": 1}}))
    assert one != distributed.config_hash(make(c=0.25))
    assert one != distributed.config_hash(make(a={"b": 1, "d": None}))
    assert re.fullmatch(r"[0-9a-f]{12}", distributed.code_hash())
    assert distributed.code_hash() == distributed.code_hash()
