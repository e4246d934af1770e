"""Real processes: they agree or say how not, stop at one step, and end when one is lost."""

import ipaddress
import os
import pathlib
import re
import signal
import socket
import time

import jax
import ml_collections
import pytest
import tiny_run
from processes import Processes, free_port

from esolm_jax.errors import UserError
from esolm_jax.parallel import coordinator, distributed, launcher, multihost
from esolm_jax.parallel.guard import guard
from esolm_jax.parallel.stop_signal import StopSignal

pytestmark = pytest.mark.fast_compile


def test_processes_meet_agree_and_part():
    script = """
    def body(index):
        assert distributed.process_count() == 2
        assert distributed.is_main() == (index == 0)
        for _ in range(2):
            multihost.barrier("again", timeout=10)
            multihost.check_same({"config": "c", "code version": "v"}, timeout=10)
        train(steps=3)
        assert (index == 0) == distributed.is_main()
        def action():
            assert index == 0
            time.sleep(1)
            return "done"
        assert multihost.on_main(action) == ("done" if index == 0 else None)
        print("done", index)
    main(body)
    """
    for index, (code, out, err) in enumerate(Processes(script).wait()):
        assert code == 0, err
        assert f"done {index}" in out and "error" not in err.lower()


def test_disagreement_is_the_same_error_everywhere():
    script = """
    def body(index):
        multihost.check_same({"config": f"c{index % 2}", "code version": "v"}, timeout=10)
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
        multihost.barrier("never", timeout=50)
    main(body)
    """
    processes = Processes(script)
    (code_0, _, err_0), (code_1, _, err_1) = processes.wait()
    assert (code_1, err_1) == (2, "error: no such file\n")
    assert (code_0, err_0) == (1, "error: process 0 lost a peer: process 1: no such file\n")


def test_barrier_that_not_all_reach():
    script = """
    def body(index):
        if index == 0:
            multihost.barrier("save", timeout=0.5)
        time.sleep(30)
    main(body)
    """
    (code_0, _, err_0), (code_1, _, err_1) = Processes(script).wait()
    message = (
        "process 0: not all 2 processes reached 'save' within 0.5 s "
        "(config.distributed.barrier_timeout)"
    )
    assert (code_0, err_0) == (2, f"error: {message}\n")
    assert code_1 == 1 and f"error: process 1 lost a peer: process 0: {message}" in err_1


@pytest.mark.parametrize("victim", [0, 1])
def test_killed_peer_ends_the_others(victim):
    """In a collective: at once."""
    script = f"""
    def body(index):
        def at_step(step):
            if step == 5 and index == {victim}:
                print("killed at", time.time())
                os.kill(os.getpid(), signal.SIGKILL)
        train(at_step=at_step)
    main(body, heartbeat_timeout=60)
    """
    processes = Processes(script)
    results = processes.wait()
    code, _, err = results[1 - victim]
    killed = float(re.search(r"killed at (\S+)", results[victim][1])[1])
    assert time.time() - killed < 40
    assert results[victim][0] == -signal.SIGKILL
    assert code == 1
    (line,) = [line for line in err.splitlines() if not line.startswith("[Gloo]")]
    reasons = "(, which was killed or crashed|: process 0 ended without a message)"
    assert re.match(f"error: process {1 - victim} lost a peer{reasons}", line)


@pytest.mark.parametrize(
    "victim, how, said",
    [
        (0, "SIGKILL", "process 0 ended without a message: it was killed or crashed"),
        (0, "SIGSTOP", "process 0 was silent for 4 s (config.distributed.heartbeat_timeout)"),
        (2, "SIGKILL", "process 2 was silent for 4 s (config.distributed.heartbeat_timeout)"),
        (1, "SIGSTOP", "process 1 was silent for 4 s (config.distributed.heartbeat_timeout)"),
    ],
)
def test_a_silent_process_ends_the_others(victim, how, said):
    """In any state: one process waits for the others, one computes alone."""
    script = f"""
    def body(index):
        multihost.barrier("begin", timeout=30)
        if index == {victim}:
            os.kill(os.getpid(), signal.{how})
        if index == {(victim + 1) % 3}:
            multihost.barrier("never", timeout=60)
        while True:
            sum(range(1000))
            time.sleep(0.001)
    main(body, heartbeat_timeout=4)
    """
    processes = Processes(script, count=3)
    survivors = [process for index, process in enumerate(processes.all) if index != victim]
    try:
        for process in survivors:
            process.wait(timeout=150)
    finally:
        for process in processes.all:
            process.kill()
    results = processes.wait()
    for index, (code, out, err) in enumerate(results):
        if index != victim:
            assert (code, out) == (1, "")
            (line,) = err.splitlines()
            assert line.startswith(f"error: process {index} lost a peer: {said}")


def test_programs_that_take_unlike_times_to_compile():
    """None runs before all have compiled it; each shape is compiled once."""
    script = """
    def body(index):
        import jax, jax.numpy as jnp, numpy as np
        from jax._src import compiler
        from jax.sharding import Mesh, NamedSharding, PartitionSpec
        mesh = Mesh(np.array(jax.devices()), ("data",))
        rows, whole = (NamedSharding(mesh, PartitionSpec(*s)) for s in (["data"], []))
        compiled, compile = [], compiler.compile_or_get_cached
        def slow(backend, module, *args, **kwargs):
            if "f" in (name := module.operation.attributes["sym_name"].value.removeprefix("jit_")):
                compiled.append(name)
                time.sleep(index * 2)
            return compile(backend, module, *args, **kwargs)
        compiler.compile_or_get_cached = slow
        def f(x, y):
            return x.sum() + y
        f = multihost.together(jax.jit(f, out_shardings=whole))
        for size in (2, 4, 2, 2):
            index_of = lambda where: np.ones(size // 2, np.float32)
            x = jax.make_array_from_callback((size,), rows, index_of)
            assert float(f(x, np.float32(1))) == size + 1
        assert compiled == ["f", "f"], compiled
    main(body, barrier_timeout={timeout})
    """
    patient, hasty = (Processes(script.format(timeout=timeout)) for timeout in (20, 1))
    ends = patient.wait(), hasty.wait()  # both at a time: they sleep
    for code, _, err in ends[0]:
        assert code == 0, err
    for code, _, err in ends[1]:
        assert code in (1, 2)  # process 1 comes late to the barrier, if it is not told before
        assert "not all 2 processes reached 'first run of f (0)' within 1.0 s" in err
        assert len([line for line in err.splitlines() if "error" in line]) == 1


def test_an_error_of_process_0_is_that_of_the_others_that_wait_for_it():
    script = """
    def body(index):
        def action():
            assert index == 0
            time.sleep(1)
            raise UserError("no such file")
        multihost.on_main(action)
        print("went on")
    main(body)
    """
    for ended in Processes(script).wait():
        assert ended == (2, "", "error: no such file\n")


@pytest.mark.parametrize("host, listens", [("localhost", ["127.0.0.1"]), ("[::1]", ["::1"])])
def test_the_coordinator_listens_where_it_is_told(host, listens):
    if host == "[::1]" and not _has_ipv6():
        pytest.skip("no IPv6 here")
    script = """
    def body(index):
        if index == 0:
            print(listening(int(os.environ["JAX_COORDINATOR_ADDRESS"].rsplit(":", 1)[1])))
        multihost.barrier("seen", timeout=20)
    main(body)
    """
    (code, out, err), (code_1, _, err_1) = Processes(LISTENING + script, host=host).wait()
    assert (code, code_1) == (0, 0), err + err_1
    assert out == f"{listens}\n"


# Where a port is listened to, of all interfaces and addresses, by the kernel's tables.
LISTENING = """
    def listening(port):
        import ipaddress, pathlib
        found = set()
        for table in ("tcp", "tcp6"):
            for line in pathlib.Path("/proc/net", table).read_text().splitlines()[1:]:
                address, number = line.split()[1].split(":")
                if int(number, 16) == port and line.split()[3] == "0A":
                    words = bytes.fromhex(address)
                    raw = b"".join(words[i : i + 4][::-1] for i in range(0, len(words), 4))
                    ip = ipaddress.ip_address(raw)
                    found.add(str(getattr(ip, "ipv4_mapped", None) or ip))
        return sorted(found)
"""


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as test:
            test.bind(("::1", 0))
    except OSError:
        return False
    return True


# What names resolve to, in the tests below.
RESOLVED = {
    "this-host": ["127.0.0.2"],
    "debian": ["127.0.1.1"],
    "two-networks": ["192.0.2.1", "127.0.0.2"],
    "elsewhere": ["192.0.2.1"],
    "link-local": ["fe80::1"],
}


@pytest.fixture
def resolver(monkeypatch):
    """Names resolve as in RESOLVED. 127.0.0.2 stands for an address of a network card, which not
    every test machine has."""
    real, is_loopback = socket.getaddrinfo, ipaddress.IPv4Address.is_loopback.fget

    def getaddrinfo(host, port, **kwargs):
        if host in RESOLVED:
            return [a for ip in RESOLVED[host] for a in real(ip, port, **kwargs)]
        return real(host, port, flags=socket.AI_NUMERICHOST, **kwargs)  # no name server is asked

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(
        ipaddress.IPv4Address,
        "is_loopback",
        property(lambda ip: str(ip) != "127.0.0.2" and is_loopback(ip)),
    )


@pytest.mark.parametrize(
    "host, bound",
    [
        ("127.0.0.1", "127.0.0.1"),
        ("localhost", "127.0.0.1"),
        ("192.0.2.1", None),  # not of this host, but of something in front of it
        ("this-host", "127.0.0.2"),
        ("two-networks", "127.0.0.2"),
        ("debian", None),  # other hosts resolve this name to another address
        ("link-local", None),
        ("elsewhere", None),
        ("unknown", None),
        ("a" * 70, None),
    ],
)
def test_where_the_coordinator_is_to_listen(host, bound, monkeypatch, resolver):
    monkeypatch.delenv("JAX_COORDINATOR_BIND_ADDRESS", raising=False)
    port = free_port()
    wanted = {"coordinator_bind_address": f"{bound}:{port}"} if bound else {}
    assert coordinator.bind_address(f"{host}:{port}") == wanted
    monkeypatch.setenv("JAX_COORDINATOR_BIND_ADDRESS", f"0.0.0.0:{port}")
    assert coordinator.bind_address(f"{host}:{port}") == {}


@pytest.mark.parametrize("host", ["127.0.0.1", "this-host", "debian", "192.0.2.1"])
def test_a_port_in_use_is_one_error(host, monkeypatch, resolver):
    monkeypatch.delenv("JAX_COORDINATOR_BIND_ADDRESS", raising=False)
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f"{host}:{port}: the port is in use on this host"):
            coordinator.bind_address(f"{host}:{port}")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_process_stops_all_after_the_same_step(number):
    script = f"""
    def body(index):
        def at_step(step):
            if step == 5 and index == 1:
                os.kill(os.getpid(), {int(number)})
        train(StopSignal(), at_step=at_step)
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
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
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
        f"error: process 0: not all 2 processes reached the coordinator at {first.address} "
        "within 2 s (config.distributed.init_timeout)\n"
    )
    assert err_2 == (
        f"error: JAX_COORDINATOR_ADDRESS={busy.address}: the port is in use on this host\n"
    )


def test_environment_of_a_launcher(monkeypatch):
    whole = dict(zip(launcher.ENV_VARS, ("host:1234", "4", "3"), strict=True))
    assert launcher.launcher_env({}) is None
    assert launcher.launcher_env(whole) == {
        "coordinator_address": "host:1234",
        "num_processes": 4,
        "process_id": 3,
        "cluster_detection_method": "deactivate",
    }
    for name in launcher.ENV_VARS:
        part = {k: v for k, v in whole.items() if k != name}
        with pytest.raises(UserError, match=f"^{name}: missing from the environment"):
            launcher.launcher_env(part)
    for name, bad in zip(launcher.ENV_VARS, ("host", "0", "4"), strict=True):
        with pytest.raises(UserError, match=f"{name}={bad}: must"):
            launcher.launcher_env(whole | {name: bad})


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
    assert launcher.in_cluster(environment) == several


@pytest.mark.parametrize(
    "environment, allocated",
    [
        ({}, None),
        (SLURM | {"SLURM_GPUS_ON_NODE": "0"}, None),
        (SLURM | {"SLURM_GPUS_ON_NODE": "8"}, ("SLURM_GPUS_ON_NODE=8", "GPUs")),
        (SLURM | {"SLURM_GPUS_PER_NODE": "h100:8"}, ("SLURM_GPUS_PER_NODE=h100:8", "GPUs")),
        (SLURM | {"SLURM_JOB_GPUS": "0"}, ("SLURM_JOB_GPUS=0", "GPUs")),  # the GPU of number 0
        ({"TPU_WORKER_ID": "0", "TPU_WORKER_HOSTNAMES": "t-0"}, ("TPU_WORKER_ID=0", "TPUs")),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),  # as `compile` sets it
    ],
)
def test_accelerators_that_a_cluster_allocates(environment, allocated):
    assert launcher.allocated_accelerators(environment) == allocated


@pytest.fixture
def unspecified_platforms():
    """As without JAX_PLATFORMS; JAX has its devices already."""
    before = jax.config.jax_platforms
    jax.devices()
    jax.config.update("jax_platforms", None)
    yield
    jax.config.update("jax_platforms", before)


@pytest.mark.parametrize("verb", ["train", "evaluate", "sample"])
def test_no_run_on_cpus_by_mistake(verb, monkeypatch, capsys, tmp_path, unspecified_platforms):
    for name in (*launcher.ENV_VARS, launcher.CLUSTER):
        monkeypatch.delenv(name, raising=False)
    flags = (f"--config={tiny_run.FILE}", f"--workdir={tmp_path}")

    def first_error():
        assert tiny_run.command(verb, *flags) == 2
        return capsys.readouterr().err

    no_data_or_checkpoint = first_error()
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    assert first_error() == (
        "error: SLURM_GPUS_ON_NODE=8: JAX finds only CPUs, but the job has GPUs; install JAX for "
        "them with `bash launch/install.sh cuda12` (cuda13 with driver 580 or newer), or set "
        "JAX_PLATFORMS=cpu to run on the CPUs\n"
    )
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert first_error() == no_data_or_checkpoint
    monkeypatch.undo()
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    jax.config.update("jax_platforms", "cpu")  # a choice
    assert first_error() == no_data_or_checkpoint


def test_one_process(monkeypatch):
    """Nothing to join: every call does nothing, and errors pass through guard()."""
    for name in (*launcher.ENV_VARS, launcher.CLUSTER):
        monkeypatch.delenv(name, raising=False)
    timeouts = dict(init_timeout=1, heartbeat_timeout=1, barrier_timeout=1)
    distributed.start(**timeouts, stoppable=True)
    assert not jax.distributed.is_initialized()
    assert (distributed.process_index(), distributed.process_count()) == (0, 1)
    assert distributed.is_main()
    multihost.barrier("x", timeout=1)
    multihost.check_same({"config": "x"}, timeout=1)
    with pytest.raises(UserError, match="mine"):
        with guard():
            raise UserError("mine")
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    with pytest.raises(UserError, match="one of the 4 hosts of a TPU slice: set ESOLM_CLUSTER=1"):
        distributed.start(**timeouts)


def test_stop_signal_of_one_process():
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        stop = StopSignal()
        assert stop.after(1) is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.after(2) == signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # a second one ends it
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_hashes():
    make = lambda **kw: ml_collections.ConfigDict({"a": {"b": 1}, "c": 0.5} | kw)  # noqa: E731
    one = multihost.config_hash(make())
    assert re.fullmatch(r"[0-9a-f]{12}", one)
    assert one == multihost.config_hash(ml_collections.ConfigDict({"c": 0.5, "a": {"b": 1}}))
    assert one != multihost.config_hash(make(c=0.25))
    assert one != multihost.config_hash(make(a={"b": 1, "d": None}))
    assert re.fullmatch(r"[0-9a-f]{12}", multihost.code_hash())
    assert multihost.code_hash() == multihost.code_hash()


@pytest.mark.parametrize(
    "environment, said",
    [
        ({}, None),
        (dict(zip(launcher.ENV_VARS, ("host:1", "1", "0"), strict=True)), None),
        (dict(zip(launcher.ENV_VARS, ("host:1", "4", "3"), strict=True)), "JAX_NUM_PROCESSES=4"),
        (SLURM, "the environment of this process"),
        ({"ESOLM_CLUSTER": "1"}, "the environment of this process"),
        ({"TPU_WORKER_HOSTNAMES": "t-0,t-1"}, None),  # of any process on such a host
    ],
)
def test_whether_a_launcher_started_several(environment, said, monkeypatch):
    for name in (*launcher.ENV_VARS, launcher.CLUSTER):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert launcher.launched() == said


def test_a_verb_of_one_process_refuses_a_launcher(monkeypatch, capsys, tmp_path):
    for name, value in zip(launcher.ENV_VARS, ("host:1", "4", "3"), strict=True):
        monkeypatch.setenv(name, value)
    path = pathlib.Path(tiny_run.FILE)
    code = tiny_run.command("compile", f"--config={path}", "--topology=v5e:2x2")
    assert code == 2
    assert "compile: must run in one process, but JAX_NUM_PROCESSES=4" in capsys.readouterr().err
