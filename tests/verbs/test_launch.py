"""The launchers: dry runs say what real runs do, odd arguments survive, processes end as promised.

The tools that they call (sbatch, gcloud, xpk, and Python itself) are fakes that record their use.
"""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time

import pytest

ROOT = pathlib.Path(__file__).parents[2]
LAUNCHERS = ["local", "slurm", "tpu_pod", "xpk"]
ODD = [
    "--config=configs/shakespeare.py",
    "--config.data.train=my corpus/*.txt",
    '--config.a=it\'s "$HOME" `x` \\ & ; {a,b} ~ #',
    "--config.b=$$(HOME) $(HOME) $$ $'x'",
    "--config.c=two\nlines, $$(HOME)",
    "",
    "é",
]
SHARED = "--workdir=/mnt/bucket/run"

# A fake of any tool: appends its name, arguments and (sbatch) standard input to $RECORDS/calls.
TOOL = """
import json, os, sys
name = os.path.basename(sys.argv[0])
call = [name, *sys.argv[1:]] + ([sys.stdin.read()] if name == "sbatch" else [])
if "scp" in call:  # the file and its folder go when all is done
    import shutil, stat
    file = next(arg for arg in call if arg.endswith(".tar.gz") and os.path.isabs(arg))
    assert stat.S_IMODE(os.stat(os.path.dirname(file)).st_mode) == 0o700
    shutil.copy(file, os.path.join(os.environ["RECORDS"], "copied.tar.gz"))
with open(os.path.join(os.environ["RECORDS"], "calls"), "a") as file:
    file.write(json.dumps(call) + "\\n")
print("output of", name)
sys.exit(int(os.environ.get("CODE", 0)))
"""

# A fake Python of launch/local.sh: records what it was told, then follows its part of $PLAN.
PROCESS = """
import json, os, pathlib, signal, subprocess, sys, time
me = os.environ["JAX_PROCESS_ID"]
records = pathlib.Path(os.environ["RECORDS"])
jax = {k: v for k, v in os.environ.items() if k.startswith("JAX_")}
(records / f"{me}.json").write_text(json.dumps([jax, sys.argv[1:]]))
print("output of process", me, flush=True)
for verb, number in json.loads(os.environ.get("PLAN", "{}")).get(me, []):
    if verb == "exit":
        sys.exit(number)
    elif verb == "sleep":
        time.sleep(number)
    elif verb == "linger":  # deaf, and with a child
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        child = subprocess.Popen(["sleep", str(number)])
        (records / "pids").write_text(f"{os.getpid()} {child.pid}")
        time.sleep(number)
    elif verb == "save":  # as training does: on a signal a checkpoint, on a second one the end
        def receive(got, frame):
            with open(records / f"{me}.signals", "a") as file:
                file.write(f"{got} ")
        signal.signal(signal.SIGTERM, receive)
        signal.signal(signal.SIGINT, receive)
        (records / f"{me}.ready").touch()
        end = time.monotonic() + 20
        while not (records / f"{me}.signals").exists() and time.monotonic() < end:
            time.sleep(0.02)
        time.sleep(number)
        sys.exit(128 + int((records / f"{me}.signals").read_text().split()[0]))
"""


def write_program(path: pathlib.Path, source: str) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{sys.executable} -IS\n{source}")
    path.chmod(0o755)
    return path


@pytest.fixture
def env(tmp_path):
    """An environment whose PATH begins with fakes, and which records their use in tmp_path."""
    for tool in ["sbatch", "srun", "scontrol", "gcloud", "xpk", "python"]:
        write_program(tmp_path / "bin" / tool, TOOL)
    (tmp_path / "bin" / "python3").symlink_to(sys.executable)
    dropped = ("JAX_", "PYTHON", "PORT", "LOGS", "GRACE", "XLA_FLAGS")
    base = {k: v for k, v in os.environ.items() if not k.startswith(dropped)}
    return base | {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "RECORDS": str(tmp_path),
        "TMPDIR": str(tmp_path),
        "PYTHON": str(write_program(tmp_path / "process", PROCESS)),
    }


def launch(script, *args, env, cwd=None):
    command = ["bash", str(ROOT / "launch" / f"{script}.sh"), *args]
    return subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, timeout=60)


def shell(command, env, **options):
    return subprocess.run(
        ["bash", "-c", command], env=env, capture_output=True, text=True, timeout=60, **options
    )


def calls(env) -> list[list[str]]:
    """The calls of fakes since the last question."""
    file = pathlib.Path(env["RECORDS"], "calls")
    if not file.exists():
        return []
    found = [json.loads(line) for line in file.read_text().splitlines()]
    file.unlink()
    return found


def test_shellcheck():
    scripts = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "launch").glob("*.sh"))
    assert {f"launch/{name}.sh" for name in LAUNCHERS} < set(scripts)
    shellcheck = pathlib.Path(sys.executable).with_name("shellcheck")
    done = subprocess.run(
        [shellcheck, "--shell=bash", *scripts], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("script", LAUNCHERS)
def test_help(script, env):
    done = launch(script, "--help", env=env, cwd="/")
    assert done.returncode == 0 and not done.stderr
    assert f"bash launch/{script}.sh [--dry-run]" in done.stdout
    assert "set -e" not in done.stdout and "usr/bin" not in done.stdout
    source = (ROOT / f"launch/{script}.sh").read_text()
    options = re.findall(r"^ +(?:--.* \| )?(--[a-z-]+)(?:=\?\*|=\*)?(?:\)| \|)", source, re.M)
    assert "--dry-run" in options
    assert all(option in done.stdout for option in options)


SLURM, POD, XPK = ["--nodes=2"], ["--name=p", "--zone=z"], ["--cluster=c", "--tpu-type=t"]
RUN = ["--", "train", SHARED]
REFUSED = {
    "local": [
        ([], "no arguments", "PROCESSES DEVICES VERB"),
        (["2", "4"], "2 4", "PROCESSES DEVICES VERB"),
        (["zero", "4", "train"], "PROCESSES=zero", "from 1 up"),
        (["0", "4", "train"], "PROCESSES=0", "from 1 up"),
        (["2", "-1", "train"], "DEVICES=-1", "from 1 up"),
        (["2", "4", "tain"], "VERB=tain", "evaluate", "prepare", "sample", "train"),
    ],
    "slurm": [
        (["--", "train"], "--nodes is missing"),
        (["--nodes=two", *RUN], "--nodes=two", "from 1 up"),
        (["--nodes", "2", *RUN], "--nodes: must be a known option with a value"),
        ([*SLURM, "--gpus-per-node=0", *RUN], "--gpus-per-node=0", "from 1 up"),
        ([*SLURM, "--cpus-per-task=x", *RUN], "--cpus-per-task=x", "from 1 up"),
        ([*SLURM, "--stop-ahead=-5", *RUN], "--stop-ahead=-5", "from 1 up"),
        ([*SLURM, "--time=1h", *RUN], "--time=1h", "24:00:00"),
        ([*SLURM, "--partition=", *RUN], "--partition=: must be a known option with a value"),
        ([*SLURM, "--parttion=a", *RUN], "--parttion=a", "--help"),
        ([*SLURM, "--mounts=/s:/s", *RUN], "--mounts=/s:/s: must be used with --image"),
        (
            [*SLURM, "--image=i", "--", "train", "--workdir=runs/a"],
            "runs/a",
            "mounted on all hosts",
        ),
        ([*SLURM, "train"], "train: must be a known option", "after --"),
        (SLURM, "-- VERB is missing"),
        ([*SLURM, "--"], "-- VERB is missing"),
        ([*SLURM, "--", "tain"], "VERB=tain", "train"),
    ],
    "tpu_pod": [
        (["--zone=z", *RUN], "--name is missing"),
        (["--name=p", *RUN], "--zone is missing"),
        ([*POD, "--create", "--version=v", *RUN], "--type is missing", "v5litepod"),
        ([*POD, "--create", "--type=t", *RUN], "--version is missing"),
        ([*POD, "--type=t", *RUN], "--type", "must be used with --create"),
        ([*POD, "--extra=--spot", *RUN], "--extra", "must be used with --create"),
        ([*POD, "--nodes=2", *RUN], "--nodes=2: must be a known option"),
        (POD, "-- VERB is missing"),
        ([*POD, "--", "tain", SHARED], "VERB=tain", "train"),
        ([*POD, "--", "train"], "--workdir=:", "mounted on all hosts"),
        ([*POD, "--", "train", "--workdir=runs/a"], "--workdir=runs/a", "mounted on all hosts"),
        ([*POD, "--", "train", "--workdir", "runs/a"], "--workdir=runs/a", "mounted on all hosts"),
    ],
    "xpk": [
        (["--tpu-type=t", "--image=i", *RUN], "--cluster is missing"),
        (["--cluster=c", "--image=i", *RUN], "--tpu-type is missing", "v5litepod"),
        ([*XPK, *RUN], "--image is missing"),
        ([*XPK, "--image=i", "--num-slices=0", *RUN], "--num-slices=0", "from 1 up"),
        ([*XPK, "--image=i", "--max-restarts=x", *RUN], "--max-restarts=x", "from 0 up"),
        ([*XPK, "--image=i", "--name=A_b", *RUN], "--name=A_b", "a-z"),
        ([*XPK, "--image=i", "--name=" + "a" * 41, *RUN], "--name=aaa", "40"),
        ([*XPK, "--image=i", "--slices=2", *RUN], "--slices=2: must be a known option"),
        ([*XPK, "--image=i"], "-- VERB is missing"),
        ([*XPK, "--image=i", "--", "tain", SHARED], "VERB=tain", "train"),
        ([*XPK, "--image=i", "--", "train", "--workdir=runs/a"], "runs/a", "mounted on all hosts"),
    ],
}


@pytest.mark.parametrize("script", LAUNCHERS)
def test_bad_input(script, env):
    for args, *words in REFUSED[script]:
        done = launch(script, *args, env=env)
        assert done.returncode == 2 and not done.stdout, args
        assert re.fullmatch(r"error: [^\n]+\n", done.stderr), (args, done.stderr)
        assert all(word in done.stderr for word in words), (args, done.stderr)
    assert not calls(env)


@pytest.mark.parametrize("variable, value", [("PORT", "x"), ("PORT", "70000"), ("GRACE", "-1")])
def test_bad_environment(variable, value, env):
    done = launch("local", "2", "4", "train", env=env | {variable: value})
    assert done.returncode == 2 and done.stderr.startswith(f"error: {variable}={value}: must be")


REMOTE = {
    "slurm": ("sbatch", SLURM),
    "tpu_pod": ("gcloud", POD),
    "xpk": ("xpk", [*XPK, "--image=i", "--name=n"]),
}


@pytest.mark.parametrize("script", REMOTE)
def test_missing_tool(script, env, tmp_path):
    tool, args = REMOTE[script]
    for name in ["bash", "date", "dirname", "git", "grep", "paste", "sed"]:
        (tmp_path / "few" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "few" / name).symlink_to(shutil.which(name))
    env = env | {"PATH": str(tmp_path / "few")}
    done = launch(script, *args, *RUN, env=env)
    assert done.returncode == 2 and not done.stdout
    assert re.search(rf"^error: {tool}: not found", done.stderr, re.M)
    assert launch(script, "--dry-run", *args, *RUN, env=env).returncode == 0
    done = launch("local", "1", "1", "train", env=env | {"PYTHON": "/no/python"})
    assert done.returncode == 2 and done.stderr.startswith("error: PYTHON=/no/python")


def same_as_dry_run(script, *args, env) -> list[list[str]]:
    """The calls of a real run, after a check that a dry run makes none and prints just these."""
    dry = launch(script, "--dry-run", *args, env=env)
    assert dry.returncode == 0 and not calls(env), dry.stderr
    real = launch(script, *args, env=env)
    assert real.returncode == 0, real.stderr
    made = calls(env)
    assert shell(dry.stdout, env, cwd=ROOT).returncode == 0
    private = re.compile(rf"{env['TMPDIR']}/esolm_jax\.\w{{10}}/")
    again = [[private.sub("PRIVATE/", arg) for arg in call] for call in calls(env)]
    assert again == [[private.sub("PRIVATE/", arg) for arg in call] for call in made]
    return made


def test_slurm(env):
    options = ["--gpus-per-node=8", "--cpus-per-task=6", "--time=1-12:00:00", "--partition=a b"]
    options += ["--account=me", "--stop-ahead=120", "--extra=--comment=it's", "--extra=--qos=long"]
    [[tool, *submit, script]] = same_as_dry_run(
        "slurm", "--nodes=4", *options, "--", "train", *ODD, env=env
    )
    assert tool == "sbatch"
    assert submit == [
        *["--job-name=esolm-train", "--nodes=4", "--ntasks-per-node=8", "--gpus-per-node=8"],
        *["--cpus-per-task=6", "--requeue", "--open-mode=append", "--signal=TERM@120"],
        *["--time=1-12:00:00", "--partition=a b", "--account=me", "--comment=it's", "--qos=long"],
    ]
    python = [env["PYTHON"], "-m", "esolm_jax.train", *ODD]
    srun = ["srun", "--kill-on-bad-exit=0", "--cpus-per-task=6", *python]
    # 143 is that of a run stopped by SIGTERM with a checkpoint: it alone asks for a requeue.
    for code, more in [(0, []), (1, []), (143, [["scontrol", "requeue", "7"]])]:
        done = shell(script, env | {"CODE": str(code), "SLURM_JOB_ID": "7"}, cwd="/")
        assert done.returncode == code, done.stderr
        assert calls(env) == [srun, *more]


def test_slurm_without_gpus(env):
    [[_, *submit, script]] = same_as_dry_run("slurm", *SLURM, "--name=n", "--", "evaluate", env=env)
    assert "--job-name=n" in submit and "--ntasks-per-node=1" in submit
    assert not [arg for arg in submit if "gpus" in arg or "cpus" in arg]
    assert "requeue" not in script  # only training saves what it has done


def test_slurm_in_a_container(env):
    """The nodes need no checkout: the command is the image's, in the image's working folder."""
    del env["PYTHON"]
    options = ["--gpus-per-node=8", "--image=r#i:1", "--mounts=/mnt:/mnt"]
    args = [*SLURM, *options, "--", "train", SHARED, *ODD]
    [[*submit, script]] = same_as_dry_run("slurm", *args, env=env)
    assert "--gpus-per-node=8" in submit and str(ROOT) not in script
    done = shell(script, env | {"SLURM_JOB_ID": "7"}, cwd="/")
    assert done.returncode == 0, done.stderr
    container = ["--container-image=r#i:1", "--container-mounts=/mnt:/mnt"]
    python = ["python", "-m", "esolm_jax.train", SHARED, *ODD]
    assert calls(env) == [["srun", "--kill-on-bad-exit=0", *container, *python]]


@pytest.fixture
def git(env):
    if shell("git rev-parse HEAD", env, cwd=ROOT).returncode:
        pytest.skip("not a git checkout")


def test_tpu_pod_commands(env, tmp_path, git):
    created = ["--create", "--type=v5litepod-256", "--version=v2", "--extra=--spot"]
    where = ["--zone=z", "--project=q"]
    args = ["--name=p", *where, *created, "--", "train", SHARED, *ODD]
    create, scp, install, start = same_as_dry_run("tpu_pod", *args, env=env)
    vm = ["gcloud", "compute", "tpus", "tpu-vm"]
    kind = ["--accelerator-type=v5litepod-256", "--version=v2", "--spot"]
    assert create == [*vm, "create", "p", *where, *kind]
    assert scp == [*vm, "scp", scp[5], "p:esolm_jax.tar.gz", *where, "--worker=all"]
    assert not pathlib.Path(scp[5]).exists()
    with tarfile.open(tmp_path / "copied.tar.gz") as archive:
        assert "esolm_jax/launch/install.sh" in archive.getnames()
    for call in install, start:
        assert call[:-1] == [*vm, "ssh", "p", *where, "--worker=all"]
        assert call[-1].startswith("--command=")
    assert launch("tpu_pod", *POD, *RUN, env=env).returncode == 0
    assert len(calls(env)) == 3  # nothing is created


def test_tpu_pod_on_a_host(env, tmp_path, git):
    """What the hosts are told, told to this one."""
    args = ["--", "train", "--workdir", "/mnt/bucket/run", *ODD]
    assert launch("tpu_pod", *POD, *args, env=env).returncode == 0
    install, start = [call[-1].removeprefix("--command=") for call in calls(env)[1:]]
    home = tmp_path / "home"
    (home / "launch").mkdir(parents=True)
    (home / "launch/install.sh").write_text('echo "installs $1 in $PWD"')
    with tarfile.open(home / "esolm_jax.tar.gz", "w:gz") as archive:
        archive.add(home / "launch", "esolm_jax/launch")
    done = shell(install, env, cwd=home)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"installs tpu in {home}/esolm_jax\n"

    write_program(home / "esolm_jax/.venv/bin/python", TOOL)
    for code in (0, 143):
        done = shell(start, env | {"CODE": str(code)}, cwd=home)
        assert done.returncode == code and "output of python" in done.stdout, done.stderr
        [[_, *argv]] = calls(env)
        assert argv == ["-m", "esolm_jax.train", "--workdir", "/mnt/bucket/run", *ODD]
    assert (home / "esolm_jax/train.log").read_text().count("output of python") == 2


def kubernetes_expand(command: str) -> str:
    """As Kubernetes reads a container's command: $$ is $, and $(NAME) a variable's value."""
    return re.sub(r"\$(\$|\(\w+\))", lambda m: "$" if m[1] == "$" else "EXPANDED", command)


def test_xpk(env):
    options = ["--num-slices=2", "--project=q", "--zone=z", "--extra=--spot", "--name=my-run"]
    args = [*XPK, "--image=gcr.io/p/i", *options, "--", "train", SHARED, *ODD]
    [[*argv, command]] = same_as_dry_run("xpk", *args, env=env)
    assert argv == [
        *["xpk", "workload", "create", "--cluster=c", "--workload=my-run", "--tpu-type=t"],
        *["--num-slices=2", "--docker-image=gcr.io/p/i", "--max-restarts=10"],
        *["--termination-grace-period-seconds=300", "--project=q", "--zone=z", "--spot"],
    ]
    command = command.removeprefix("--command=")
    assert "\n" not in command  # xpk writes it into one line of YAML
    done = shell(kubernetes_expand(command), env | {"CODE": "143"})
    assert done.returncode == 143
    assert calls(env) == [["python", "-m", "esolm_jax.train", SHARED, *ODD]]


def test_xpk_names_a_workload(env):
    done = launch("xpk", "--dry-run", *XPK, "--image=i", *RUN, env=env)
    assert re.search(r" --workload=esolm-train-\d{4}-\d{6} ", done.stdout)


@pytest.mark.parametrize("script, args", [("tpu_pod", POD), ("xpk", [*XPK, "--image=i"])])
def test_mounted_workdir_is_taken(script, args, env, git):
    args = ["--dry-run", *args, "--", "train", "--workdir=/mnt/run"]
    done = launch(script, *args, env=env)
    assert done.returncode == 0 and "--workdir=/mnt/run" in done.stdout


def told(tmp_path, count) -> list:
    """What each fake process of launch/local.sh was told: [JAX_… variables, arguments]."""
    return [json.loads((tmp_path / f"{i}.json").read_text()) for i in range(count)]


def test_local(env, tmp_path):
    env["LOGS"] = str(tmp_path / "my logs")
    done = launch("local", "3", "4", "train", *ODD, env=env, cwd="/")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("output of process") == 1 and "process 0" in done.stdout
    assert env["LOGS"] in done.stdout and not done.stderr
    for i in (1, 2):
        assert (tmp_path / "my logs" / f"{i}.log").read_text() == f"output of process {i}\n"
    seen = told(tmp_path, 3)
    address = seen[0][0]["JAX_COORDINATOR_ADDRESS"]
    assert re.fullmatch(r"localhost:\d+", address)
    for i, (variables, argv) in enumerate(seen):
        assert argv == ["-m", "esolm_jax.train", *ODD]
        assert variables == {
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_NUM_PROCESSES": "3",
            "JAX_PROCESS_ID": str(i),
            "JAX_NUM_CPU_DEVICES": "4",
            "JAX_PLATFORMS": "cpu",
        }


def test_logs_go_into_a_private_folder(env, tmp_path):
    """Planted links at the paths of logs or archives are not followed."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    env |= {"PORT": "12345"}
    (tmp_path / "esolm_jax-12345").mkdir()
    (tmp_path / "esolm_jax-12345" / "1.log").symlink_to(victim)
    folders = []
    for _ in range(2):
        done = launch("local", "2", "1", "train", env=env)
        assert done.returncode == 0, done.stderr
        folder = re.search(r"^logs of processes 1 to 1: (.+)/I.log$", done.stdout, re.M)[1]
        folder = pathlib.Path(folder)
        assert folder.parent == tmp_path and folder.stat().st_mode & 0o777 == 0o700
        assert (folder / "1.log").read_text() == "output of process 1\n"
        folders.append(folder)
    assert folders[0] != folders[1]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "1.log").symlink_to(victim)
    mine = env | {"LOGS": f"{tmp_path}/mine"}
    assert launch("local", "2", "1", "train", env=mine).returncode == 0
    assert not (tmp_path / "mine" / "1.log").is_symlink()
    done = launch("local", "2", "1", "train", env=env | {"LOGS": str(victim)})
    assert done.returncode == 2 and f"error: LOGS={victim}: must be a folder" in done.stderr
    assert victim.read_text() == "precious"
    dry = launch("local", "--dry-run", "2", "1", "train", env=env).stdout
    assert dry.startswith("logs=$(mktemp -d ") and '>"$logs/1.log"' in dry
    assert shell(f"{dry} wait", env, cwd=ROOT).returncode == 0
    assert len(list(tmp_path.glob("esolm_jax.*/1.log"))) == 3


def test_local_dry_run(env, tmp_path):
    env |= {"PORT": "12345", "LOGS": str(tmp_path / "my logs")}
    args = ["3", "4", "train", *ODD]
    dry = launch("local", "--dry-run", *args, env=env)
    assert dry.returncode == 0 and len(dry.stdout.splitlines()) == 3
    assert not list(tmp_path.glob("*.json")) and not (tmp_path / "my logs").exists()
    assert launch("local", *args, env=env).returncode == 0
    real = told(tmp_path, 3)
    assert real[0][0]["JAX_COORDINATOR_ADDRESS"] == "localhost:12345"
    for i in range(3):
        (tmp_path / f"{i}.json").unlink()
    assert shell(f"{dry.stdout} wait", env, cwd=ROOT).returncode == 0
    assert told(tmp_path, 3) == real


def plan(**processes) -> dict[str, str]:
    """PLAN of the fakes: plan(p1=[("exit", 3)])."""
    return {"PLAN": json.dumps({name[1:]: steps for name, steps in processes.items()})}


def test_local_first_failure_counts(env, tmp_path):
    steps = plan(p0=[("sleep", 1), ("exit", 5)], p1=[("exit", 3)])
    done = launch("local", "3", "1", "train", env=env | steps)
    assert done.returncode == 3
    assert "process 1 of 3 ended with code 3" in done.stderr
    assert "output of process 1" in done.stderr  # the end of its log
    assert "process 0 of 3 ended with code 5" in done.stderr  # it had its time
    assert "output of process 2" not in done.stderr and "killing" not in done.stderr


def check_all_gone(pids: list[int]) -> None:
    """No process has one of these ids, or a dead one that nobody waited for yet."""

    def alive(pid):
        try:
            state = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            return False
        return state != "Z"

    end = time.monotonic() + 5
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < end
        time.sleep(0.02)


def test_local_kills_survivors(env, tmp_path):
    steps = plan(p0=[("linger", 30)], p1=[("sleep", 0.5), ("exit", 3)])
    begin = time.monotonic()
    done = launch("local", "2", "1", "train", env=env | steps | {"GRACE": "1"})
    assert done.returncode == 3 and time.monotonic() - begin < 10
    assert "killing process(es) 0" in done.stderr
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert len(pids) == 2
    check_all_gone(pids)


def started(env, tmp_path, command, count, **options) -> subprocess.Popen:
    process = subprocess.Popen(
        command,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        # A shell cannot trap what is ignored when it starts, as SIGINT is in the background.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **options,
    )
    end = time.monotonic() + 20
    while len(list(tmp_path.glob("*.ready"))) < count:
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.02)
    time.sleep(0.1)
    return process


SAVING = plan(p0=[("save", 0.1)], p1=[("save", 0.6)])
LOCAL = ["bash", str(ROOT / "launch/local.sh"), "2", "1", "train"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_local_passes_signals_on(number, env, tmp_path):
    process = started(env | SAVING, tmp_path, LOCAL, 2)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert b"ended with" not in output and b"killing" not in output
    for i in range(2):
        assert (tmp_path / f"{i}.signals").read_text() == f"{int(number)} "


def test_the_harness_is_launched_with_its_own_arguments(env):
    """Its workdir is in --model_args."""
    args = ["harness", "--model=esolm", "--tasks=a", "--model_args"]
    done = launch("local", "--dry-run", "2", "1", *args, "workdir=runs/a,step=3", env=env)
    assert done.returncode == 0 and done.stdout.count("-m esolm_jax.harness") == 2
    on_pod = ["--dry-run", *POD, "--", *args]
    assert launch("tpu_pod", *on_pod, "workdir=/mnt/run,step=3", env=env).returncode == 0
    refused = launch("tpu_pod", *on_pod, "workdir=runs/a,step=3", env=env)
    assert refused.returncode == 2 and "--workdir=runs/a: must be an absolute" in refused.stderr


def test_local_ctrl_c(env, tmp_path):
    """The terminal's Ctrl-C reaches each process once: a second one would end it unsaved."""
    terminal = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"
    command = [sys.executable, "-c", terminal, *LOCAL]
    process = started(env | SAVING, tmp_path, command, 2, stdin=subprocess.PIPE)
    process.stdin.write(b"\x03")
    process.stdin.flush()
    process.wait(timeout=60)
    assert process.returncode == 130
    process.communicate()
    for i in range(2):
        assert (tmp_path / f"{i}.signals").read_text() == f"{int(signal.SIGINT)} "


def test_local_killed_outright_leaves_no_process(env, tmp_path):
    """Any signal but SIGKILL ends them: here SIGHUP, even if the tests ignore it (nohup)."""
    steps = plan(p0=[("linger", 60)])
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup's is inherited
    process = subprocess.Popen(
        [*LOCAL[:2], "1", "1", "train"], env=env | steps, stdout=subprocess.PIPE
    )
    signal.signal(signal.SIGHUP, before)
    end = time.monotonic() + 20
    while not (tmp_path / "pids").exists():
        assert time.monotonic() < end
        time.sleep(0.02)
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=30)
    check_all_gone([int(pid) for pid in (tmp_path / "pids").read_text().split()])
