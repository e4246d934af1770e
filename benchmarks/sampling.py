"""Speed of sampling: docs/sampling.{json,md,png}.

    python -m benchmarks.sampling [--only=eso_b,ar,mdlm,bd3:4,bd3:16] [--published=DIR]
    python -m benchmarks.sampling --quick      # L = 256, batch 1: two minutes

Every family with the same backbone (random weights, float32), its own cache if it can have one, at
one token per pass and with T = L/4. Compiling and planning are timed apart. Where a generation
would take long, passes spread evenly over it are timed and the rest is extrapolated; the results
say so. With --published=DIR, a checkout of the published PyTorch code (which needs torch and
einops: --published_python), its samplers take turns with ours, never at the same time. What was
measured before stays in the JSON until it is measured again.
"""

import argparse
import dataclasses
import functools
import json
import os
import pathlib
import statistics
import sys

import jax

from benchmarks import report_writer, sampling_cases, sampling_limits, sampling_report
from benchmarks.machine import Load, machine, num_threads, spread
from benchmarks.published_process import PublishedProcess
from benchmarks.sampling_cases import AR_CONFIG, CONFIG, MASK, Case, Ours
from esolm_jax import results
from esolm_jax.sampling.engine import network

ROOT = pathlib.Path(__file__).resolve().parent.parent
SHORT = 10  # seconds: of generations that take longer there is one run
PUBLISHED_TOKENS = 8192  # in a batch, at most: the published code takes minutes beyond


class Published:
    """The process that samples with the published code when told to (published_sampling.py)."""

    def __init__(self, directory: str, python: str):
        names = {"width", "blocks", "heads", "cond_width"}
        request = {"shapes": {name: getattr(CONFIG, name) for name in names} | {"vocab_size": MASK}}
        self.process = PublishedProcess("published_sampling.py", directory, python, request)

    @staticmethod
    def has(case: Case) -> bool:
        if case.length * case.batch > PUBLISHED_TOKENS:
            return False
        return case.objective in ("eso_b", "ar") or (
            case.objective == "mdlm" and case.num_steps > 0
        )

    def run(self, case: Case, threads: int) -> dict:
        """MDLM's passes are all alike: of four, extrapolated by the caller."""
        num_steps = 4 if case.objective == "mdlm" else case.num_steps
        alpha_0 = 0.0 if case.objective == "ar" else case.alpha_0
        request = {"objective": case.objective, "alpha_0": alpha_0, "num_steps": num_steps}
        request |= {"length": case.length, "batch": case.batch, "threads": threads}
        return self.process.ask(request) | {"threads": threads}


def measure(ours: Ours, published: Published | None, load: Load) -> dict:
    """Median of several runs, in turn with the published code's."""
    case, mine, theirs, others, rounds = ours.case, [], [], [], 1
    counts = [num_threads()]
    if published and published.has(case):
        counts = sorted({1, num_threads()})  # small products are faster in one thread: let it

    def turn():
        taken, whole = ours.run()
        found = [published.run(case, n) for n in counts] if asks else []
        return (taken, whole, found), sum(f["cpu_seconds"] for f in found)

    asks = bool(published and published.has(case))
    while len(mine) < rounds:
        load.wait()
        (taken, whole, found), busy = load.during(turn)
        mine.append(whole)
        others.append(busy)
        if found:
            theirs.append(min(found, key=lambda f: f["seconds"]))
            counts = [theirs[0]["threads"]]
        longest = max([taken, *(f["seconds"] for f in found)])
        rounds = max(rounds, 1 if longest > SHORT else 3 if longest > 2 else 5)
    row = _row(ours, mine, others)
    if theirs:
        row["published"] = _published_row(ours, theirs)
        ratio = row["published"]["seconds"]["median"] / row["seconds"]["median"]
        row["speed_relative_to_published"] = ratio
    return row


def _row(ours: Ours, seconds: list[float], others: list[float]) -> dict:
    case, median = ours.case, statistics.median(seconds)
    return dataclasses.asdict(case) | {
        "nfe": ours.nfe,
        "seconds": spread(seconds),
        "runs": len(seconds),
        "tokens_per_second": case.batch * case.length / median,
        "ms_per_pass": 1e3 * median / ours.nfe,
        "extrapolated": ours.count < ours.nfe or ours.rows < case.batch,
        "timed_passes": ours.count,
        "timed_rows": ours.rows,
        "compile_seconds": ours.compile_seconds,
        "plan_seconds": ours.plan_seconds,
        "start_seconds": ours.start_seconds,
        "cores_busy_with_others": statistics.median(others),
        **ours.needed,
    }


def _published_row(ours: Ours, runs: list[dict]) -> dict:
    case = ours.case
    timed = statistics.median(run["nfe"] for run in runs)
    extrapolated = case.objective == "mdlm"
    nfe = ours.nfe if extrapolated else timed
    seconds = [run["seconds"] * (nfe / timed if extrapolated else 1) for run in runs]
    median = statistics.median(seconds)
    return {
        "seconds": spread(seconds),
        "runs": len(runs),
        "nfe": nfe,
        "tokens_per_second": case.batch * case.length / median,
        "ms_per_pass": 1e3 * median / nfe,
        "extrapolated": extrapolated,
        "threads": runs[-1]["threads"],
    }


def run(options) -> dict:
    path = options.out.with_suffix(".json")
    before = json.loads(path.read_text()) if path.exists() else {"rows": {}, "published": None}
    rows = before["rows"]
    load = Load(options.patience)
    limits = sampling_limits.measure(load)
    published = None
    if options.published:
        published = Published(options.published, options.published_python)
    params = {config: sampling_cases.random_params(config) for config in (CONFIG, AR_CONFIG)}
    networks = {config: network.fold(config, of) for config, of in params.items()}
    report = {
        "machine": machine(),
        "published": published.process.about if published else before["published"],
        "shapes": {n: getattr(CONFIG, n) for n in "width blocks heads vocab_size dtype".split()},
        "limits": limits,
    }
    for case in sampling_cases.cases(options.only, options.lengths, options.batches):
        net = networks[AR_CONFIG if case.objective == "ar" else CONFIG]
        row = measure(Ours(case, net), published, load)
        if case.objective == "mdlm":
            load.wait()
            seconds = sampling_cases.training_forward_seconds(params[CONFIG], case)
            row["training_forward_ms"] = 1e3 * seconds
        row["read_ms"] = sampling_limits.read_ms(limits, row)
        row["bandwidth_fraction"] = row["read_ms"] / row["ms_per_pass"]
        of_products = 1e3 * row["flops_per_pass"] / limits["flops_per_second"]
        row["flops_fraction"] = of_products / row["ms_per_pass"]
        rows[case.name] = row | {"command": command()}
        report |= {"targets": sampling_report.targets(rows), "rows": rows}
        results.write_json(path, report)  # so that little is lost if it ends here
        print(sampling_report.line(case.name, row), flush=True)
        jax.clear_caches()  # the programs of other shapes, which are not run again
    return report


def command() -> str:
    """The command line, without this machine's paths."""
    hidden = {"--published": "DIR", "--published_python": "PYTHON"}
    args = []
    for arg in sys.argv[1:]:
        name, _, _ = arg.partition("=")
        args.append(f"{name}={hidden[name]}" if name in hidden else arg)
    return " ".join(["python -m benchmarks.sampling", *args])


def main() -> None:
    def numbers(text):
        return [int(n) for n in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument(
        "--only", type=lambda s: s.split(","), default=sampling_cases.FAMILIES, help="families"
    )
    parser.add_argument("--lengths", type=numbers, default=sampling_cases.LENGTHS)
    parser.add_argument("--batches", type=numbers, default=sampling_cases.BATCHES)
    parser.add_argument("--quick", action="store_true", help="L = 256, batch 1, in runs/")
    parser.add_argument("--out", type=pathlib.Path, help="without .json")
    parser.add_argument("--published", default="", help="a checkout of the published code")
    parser.add_argument("--published_python", default=sys.executable, help="with torch and einops")
    parser.add_argument("--patience", type=float, default=0, help="seconds to wait for a pause")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 = all (Linux only)")
    options = parser.parse_args()
    if options.threads:  # before JAX and PyTorch count them
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    if options.quick:
        options.lengths, options.batches = [256], [1]
    default = ROOT / ("runs" if options.quick else "docs") / "sampling"
    options.out = options.out or default
    options.out.parent.mkdir(parents=True, exist_ok=True)
    report = run(options)
    draw = functools.partial(sampling_report.plot, report["rows"])
    report_writer.write(options.out, report, sampling_report.table(report), draw)


if __name__ == "__main__":
    main()
