"""Settings in a user's environment: the same numbers, or one clear line?

Each case is a process with other environment variables. It resumes a tiny run, evaluates it and
samples from it, and its results are compared, bit for bit, with those of the plain environment.
`python -m benchmarks.reliability.settings` prints the table; a few minutes on 2 cores.
"""

import concurrent.futures
import functools
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

OUTCOMES = ("identical", "one line", "differs, noted", "silent", "traceback", "hang")
TIMEOUT = 600.0
STEPS, MORE = 2, 4  # of the run that is copied, and when it is done
_OWN = ("JAX_", "XLA_", "PYTHON", "LANG", "LC_", "TF_CPP", "OMP_")  # not inherited


def _jax(**values) -> dict[str, dict[str, str]]:
    return {f"JAX_{name}={value}": {f"JAX_{name}": str(value)} for name, value in values.items()}


def _env(**values) -> dict[str, dict[str, str]]:
    return {f"{name}={value}": {name: str(value)} for name, value in values.items()}


def _xla(*flags: str) -> dict[str, dict[str, str]]:
    return {f"XLA_FLAGS={flag}": {"XLA_FLAGS": flag} for flag in flags}


def cases(folder: pathlib.Path) -> dict[str, dict[str, str]]:
    """Environment variables by name of the case; `folder` is for files that some of them name."""
    blocked = folder / "file"
    blocked.write_text("not a folder")
    return {
        **_jax(DEFAULT_PRNG_IMPL="rbg", THREEFRY_PARTITIONABLE=0, RANDOM_SEED_OFFSET=3),
        **_jax(DEFAULT_PRNG_IMPL="unsafe_rbg", ENABLE_X64=1, ENABLE_CUSTOM_PRNG=1),
        **_jax(NUMPY_DTYPE_PROMOTION="strict", NUMPY_RANK_PROMOTION="raise"),
        **_jax(DEFAULT_MATMUL_PRECISION="bfloat16"),
        **_jax(DEFAULT_MATMUL_PRECISION="highest"),
        **_jax(DEFAULT_MATMUL_PRECISION="BF16_BF16_F32"),
        **_jax(DEFAULT_MATMUL_PRECISION="nonsense", ENABLE_X64="maybe"),
        **_jax(DEBUG_NANS=1, DEBUG_INFS=1, CHECK_TRACER_LEAKS=1, ENABLE_CHECKS=1),
        **_jax(DISABLE_JIT=1, TRANSFER_GUARD="disallow", LOG_COMPILES=1),
        **_jax(TRACEBACK_FILTERING="off", EXPLAIN_CACHE_MISSES=1, DEBUG_KEY_REUSE=1),
        **_jax(COMPILATION_CACHE_DIR=folder / "missing" / "deep"),
        **_jax(COMPILATION_CACHE_DIR=blocked / "below-a-file"),
        **_jax(ENABLE_COMPILATION_CACHE=0, NUM_CPU_DEVICES=2),
        **_jax(PLATFORMS="cuda"),
        **_jax(PLATFORMS="nonsense"),
        **_jax(PLATFORMS="rocm,cpu"),
        **_xla("--xla_force_host_platform_device_count=8", "--xla_cpu_multi_thread_eigen=false"),
        **_xla(f"--xla_dump_to={folder / 'dump'}", "--xla_unknown_flag=1"),
        **_xla("--xla_force_host_platform_device_count=many"),
        **_env(XLA_FLAGS="/no/such/file", TF_CPP_MIN_LOG_LEVEL=0, PYTHONOPTIMIZE=2),
        **_env(PYTHONHASHSEED=7, LC_ALL="POSIX", PYTHONIOENCODING="ascii", MPLBACKEND="nonsense"),
        "LANG=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0": {
            "LANG": "C",
            "PYTHONUTF8": "0",
            "PYTHONCOERCECLOCALE": "0",
        },
        **_env(HOME=blocked, TMPDIR=folder / "no-folder", TERM="dumb", COLUMNS=0, NO_COLOR=1),
        **_env(OMP_NUM_THREADS=1, MPLCONFIGDIR=blocked, PYTHONWARNINGS="error"),
    }


def _environment(case: dict[str, str], cache: pathlib.Path) -> dict[str, str]:
    plain = {name: value for name, value in os.environ.items() if not name.startswith(_OWN)}
    fixed = {
        "PYTHONPATH": str(pathlib.Path(__file__).parents[2]),
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return plain | fixed | case


def _start(case: dict[str, str], workdir: pathlib.Path, cache: pathlib.Path, *args: str):
    """Runs _verbs in a process of its own: (exit code or None, its value or None, stderr)."""
    command = [sys.executable, "-m", "benchmarks.reliability.settings", str(workdir), *args]
    environment = _environment(case, cache)
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, timeout=TIMEOUT, cwd=workdir.parent
        )
    except subprocess.TimeoutExpired as error:
        return None, None, (error.stderr or b"").decode(errors="replace")
    out, err = (text.decode(errors="replace") for text in (done.stdout, done.stderr))
    try:
        return done.returncode, json.loads(out.splitlines()[-1]), err
    except (IndexError, json.JSONDecodeError):
        return done.returncode, None, err


def _verbs(workdir: pathlib.Path, args: list[str]) -> list[dict]:
    """In the process of a case: the verbs until one fails, as JSON-able dicts."""
    from esolm_jax.process import startup

    startup.begin()
    from benchmarks.reliability import verbs

    verbs.import_verbs()
    ends = []
    for verb in ("train", "evaluate", "sample"):
        ended = verbs.run(verb, [f"--workdir={workdir}", *(args if verb == "train" else [])])
        ends.append({"code": ended.code, "out": ended.out, "err": ended.err})
        if ended.code != 0:
            break
    return ends


def _results(workdir: pathlib.Path) -> dict:
    lines = (workdir / "metrics.jsonl").read_text("utf-8").splitlines()
    metrics = [json.loads(line) for line in lines]
    for entry in metrics:
        for of_the_clock in ("timing", "crc32"):
            entry.pop(of_the_clock, None)
    figures = json.loads((workdir / "evaluate.json").read_text("utf-8"))
    texts = [
        json.loads(line) for line in (workdir / "samples.jsonl").read_text("utf-8").split("\n")[:-1]
    ]
    return {"metrics": metrics, "evaluation": figures["results"], "texts": texts}


def _outcome(code, ends, err: str, same) -> tuple[str, str]:
    """(one of OUTCOMES, what was said)."""
    ends = ends if ends is not None else [{"code": code, "out": "", "err": err}]
    last = ends[-1]
    said = "".join(end["out"] + end["err"] for end in ends)
    if last["code"] is None:
        return "hang", last["err"][-300:]
    if "Traceback (most recent call last)" in said or last["code"] < 0:
        return "traceback", last["err"][-1500:]
    if last["code"]:
        errors = [line for line in last["err"].splitlines() if line.startswith("error: ")]
        return ("one line" if len(errors) == 1 else "silent"), (errors or [last["err"][-300:]])[0]
    if same():
        return "identical", ""
    notes = [line for line in said.splitlines() if line.startswith("note: ")]
    return ("differs, noted", notes[0]) if notes else ("silent", "other numbers")


def run(folder: pathlib.Path, only: str = "") -> list[dict]:
    """[{"setting", "outcome", "said"}]; `only`: cases whose names contain it."""
    from benchmarks.reliability import tiny

    folder.mkdir(parents=True, exist_ok=True)
    folder = folder.resolve()
    cache, args = folder / "compiled", tiny.write_text(folder / "text")
    args += ["--config.train.eval_every=2", "--config.train.checkpoint_every=2"]
    args += ["--config.mesh.devices=1", f"--config.train.steps={MORE}"]
    original, plain = folder / "original", folder / "plain"
    prepare = [sys.executable, "-m", "esolm_jax.prepare", f"--workdir={original}", *args]
    subprocess.run(prepare, check=True, env=_environment({}, cache), capture_output=True)
    halfway = [*args, f"--config.train.steps={STEPS}"]
    for workdir, arguments in ((original, halfway), (plain, args)):
        if workdir is plain:
            shutil.copytree(original, plain)
        code, ends, err = _start({}, workdir, cache, *arguments)
        if code or ends[-1]["code"]:
            raise RuntimeError(f"{workdir.name}: {err}{ends and ends[-1]}")
    right = _results(plain)

    def one(item) -> dict:
        index, (name, case) = item
        workdir = folder / f"case-{index}"
        shutil.copytree(original, workdir)
        ended = _start(case, workdir, cache, *args)
        outcome, said = _outcome(*ended, functools.partial(lambda w: _results(w) == right, workdir))
        print(f"  {name}: {outcome} {said[-600:]}", flush=True)
        shutil.rmtree(workdir)
        return {"setting": name, "outcome": outcome, "said": said}

    chosen = [(i, c) for i, c in enumerate(cases(folder).items()) if only in c[0]]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return list(pool.map(one, chosen))


def main() -> None:
    if len(sys.argv) > 2:
        print(json.dumps(_verbs(pathlib.Path(sys.argv[1]), sys.argv[2:])))
        return
    with tempfile.TemporaryDirectory(prefix="settings-") as folder:
        found = run(pathlib.Path(folder) / "work", *sys.argv[1:])
    faults = [row for row in found if row["outcome"] in ("silent", "traceback", "hang")]
    print(f"{len(found)} settings, {len(faults)} faults")
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
