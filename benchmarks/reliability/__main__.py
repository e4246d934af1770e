"""python -m benchmarks.reliability [--quick] [--only=kills,corruption] [--out=docs/reliability].

Counts the outcomes of kills, corruptions, concurrent starts, readers during a writer and hostile
input. Under an hour on 2 cores; --quick takes a few minutes. Exit code 1 for any silent error,
traceback or hang. Writes --out (.json) and the tables (.md).
"""

import argparse
import concurrent.futures
import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

from benchmarks.reliability import hostile

# Set before JAX is imported, here and in the children: a shared compilation cache, CPU only.
os.environ.setdefault("JAX_PLATFORMS", "cpu")


def _kills(folder: pathlib.Path, quick: bool) -> list[dict]:
    from benchmarks.reliability import kills

    return kills.one_process(folder, 3 if quick else 60)


def _kills_of_two(folder: pathlib.Path, quick: bool) -> list[dict]:
    from benchmarks.reliability import kills

    return kills.two_processes(folder, 2 if quick else 20)


def _corruption(folder: pathlib.Path, quick: bool) -> list[dict]:
    from benchmarks.reliability import corruption

    return corruption.run(folder, 8 if quick else 304)


def _starts(folder: pathlib.Path, quick: bool) -> list[dict]:
    from benchmarks.reliability import sharing

    return sharing.concurrent_starts(folder, 3 if quick else 30)


def _readers(folder: pathlib.Path, quick: bool) -> list[dict]:
    from benchmarks.reliability import sharing

    return sharing.readers(folder, 5 if quick else 300)


def _cost(folder: pathlib.Path, quick: bool) -> list[dict]:
    from benchmarks.reliability import cost

    return cost.run(folder, quick)


SECTIONS: dict[str, Callable[[pathlib.Path, bool], list[dict]]] = {  # the longest first
    "corruption": _corruption,
    "kills": _kills,
    "kills_of_two": _kills_of_two,
    "readers": _readers,
    "settings": hostile.settings,
    "starts": _starts,
    "foreign": hostile.foreign,
    "configs": hostile.configs,
    "prompts": hostile.prompts,
    "infilling": hostile.infilling,
    "cost": _cost,
}
TIMED = ("cost",)


def _run_section(name: str, quick: bool, out: pathlib.Path) -> None:
    from benchmarks.reliability import verbs

    verbs.import_verbs()
    with tempfile.TemporaryDirectory(prefix=f"{name}-") as folder:
        rows = SECTIONS[name](pathlib.Path(folder) / "work", quick)
    out.write_text(json.dumps(rows))


def _in_own_process(name: str, quick: bool, folder: pathlib.Path) -> dict:
    """{"rows": …, "seconds": …} of one section; its output is printed when it has ended."""
    begin, out = time.monotonic(), folder / f"{name}.json"
    root = pathlib.Path(__file__).parents[2]
    cache = {
        "PYTHONPATH": str(root),
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, "-m", "benchmarks.reliability", f"--section={name}"]
    command += [f"--out={out}", *(["--quick"] if quick else [])]
    with open(folder / f"{name}.log", "w+") as log:
        code = subprocess.run(command, env=os.environ | cache, stdout=log, stderr=log).returncode
        log.seek(0)
        seconds = time.monotonic() - begin
        print(f"== {name}: {seconds:.0f} s\n{log.read()}", flush=True)
    if code:
        raise RuntimeError(f"section {name} ended with exit code {code}")
    return {"rows": json.loads(out.read_text()), "seconds": seconds}


def _all_sections(names: list[str], quick: bool, jobs: int) -> dict[str, dict]:
    """Each section in its own process, `jobs` at a time; timed sections run alone at the end."""
    with tempfile.TemporaryDirectory(prefix="reliability-") as folder:
        run = functools.partial(_in_own_process, quick=quick, folder=pathlib.Path(folder))
        counted = [name for name in names if name not in TIMED]
        with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
            found = dict(zip(counted, pool.map(run, counted), strict=True))
        found |= {name: run(name) for name in names if name in TIMED}
    return {name: found[name] for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a few attempts of each, for CI")
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, comma-separated")
    parser.add_argument(
        "--jobs", type=int, default=3, help="sections at a time; kills_of_two waits most of it"
    )
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("docs/reliability"))
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.section:
        _run_section(args.section, args.quick, args.out)
        return
    from benchmarks.reliability import report

    names = args.only.split(",")
    if unknown := set(names) - SECTIONS.keys():
        parser.error(f"--only={args.only}: {', '.join(unknown)}: must be of {', '.join(SECTIONS)}")
    sections = _all_sections(names, args.quick, args.jobs)
    faults = report.write(args.out, sections)
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
