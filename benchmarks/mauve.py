"""python -m benchmarks.mauve [--texts=500 --seeds=30 --out=FILE]: MAUVE against the published code.

Both get the same features and settings; each has its own k-means. Features are synthetic: a mixture
of clusters whose directions have unequal variances, as hidden states have; the sets differ in the
weights of the clusters and in their centers. Needs the published package, which brings no PyTorch:
pip install mauve-text==0.4.0.
"""

import dataclasses
import pathlib
import sys
import time

import numpy as np
from absl import app, flags

from benchmarks import report_writer
from esolm_jax.evaluation.quality import mauve

_TEXTS = flags.DEFINE_integer("texts", 500, "In each of the two sets.")
_SEEDS = flags.DEFINE_integer("seeds", 30, "Of k-means, on the same features.")
_OUT = flags.DEFINE_string("out", "", "FILE.json and FILE.md are written; none = print only.")
WIDTH, CENTERS = 256, 40


@dataclasses.dataclass(frozen=True)
class Case:
    """How the second set differs: `shift` of the centers, `skew` of the weights of clusters."""

    name: str
    shift: float
    skew: float


CASES = (
    Case("equal", 0.0, 0.0),
    Case("slightly different", 0.2, 0.2),
    Case("different", 0.6, 1.0),
    Case("very different", 2.0, 2.0),
)


def features(case: Case, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Two sets [count, WIDTH], float32."""
    rng = np.random.default_rng(0)
    scale = 1 / np.sqrt(1 + np.arange(WIDTH))
    centers = rng.normal(size=(CENTERS, WIDTH)) * scale
    moved = centers + case.shift * rng.normal(size=WIDTH) * scale
    weight = np.exp(case.skew * rng.normal(size=CENTERS))

    def draw(means: np.ndarray, weights: np.ndarray) -> np.ndarray:
        chosen = rng.choice(len(means), size=count, p=weights / weights.sum())
        noise = 0.7 * rng.normal(size=(count, WIDTH)) * scale
        return (1.0 + means[chosen] + noise).astype(np.float32)

    return draw(centers, np.ones(CENTERS)), draw(moved, weight)


def ours(sides: tuple[np.ndarray, np.ndarray], seed: int) -> float:
    return mauve.of_features(sides, mauve.default_clusters([len(side) for side in sides]), seed)


def published(sides: tuple[np.ndarray, np.ndarray], seed: int) -> float:
    """AssertionError: our area under the curve of their histograms is another."""
    import mauve as theirs

    found = theirs.compute_mauve(*sides, seed=seed)
    same = mauve.of_histograms(found.p_hist, found.q_hist)
    assert abs(same - found.mauve) < 1e-9, (same, found.mauve)
    return float(found.mauve)


def measure(case: Case) -> dict:
    """Values of all seeds, and seconds, of both."""
    sides, found = features(case, _TEXTS.value), {}
    for name, run in (("ours", ours), ("published", published)):
        begin = time.perf_counter()
        values = [run(sides, seed) for seed in range(_SEEDS.value)]
        seconds = (time.perf_counter() - begin) / len(values)
        found[name] = {"values": values, "seconds": seconds}
    return found


def table(report: dict) -> str:
    rows = []
    for name, case in report["cases"].items():
        values = [np.array(case[who]["values"]) for who in ("ours", "published")]
        cells = [f"{v.mean():.4f} ± {v.std(ddof=1):.4f}" for v in values]
        error = np.sqrt(sum(v.var(ddof=1) / len(v) for v in values))
        difference = values[0].mean() - values[1].mean()
        rows.append([name, *cells, f"{difference:+.4f} ± {error:.4f}"])
    head = "sets", "ours", "published", "difference of the means"
    return (
        "# MAUVE against the published code\n\nMade by `python -m benchmarks.mauve`.\n\n"
        f"{report_writer.table(head, rows)}\n"
        f"Two sets of {report['texts']} features; mean and standard deviation over "
        f"{report['seeds']} seeds of k-means; the error of a difference is that of the means. The "
        "published histograms give the same area by our code, to 1e-9.\n"
    )


def main(argv) -> None:
    del argv
    try:
        import mauve as _  # noqa: F401
    except ImportError as error:
        sys.exit(f"error: {error}: pip install mauve-text==0.4.0")
    cases = {case.name: measure(case) for case in CASES}
    report = {"texts": _TEXTS.value, "seeds": _SEEDS.value, "cases": cases}
    if _OUT.value:
        report_writer.write(pathlib.Path(_OUT.value), report, table(report))
    else:
        print(table(report))
    for name, case in cases.items():
        print(name, {who: f"{one['seconds']:.2f} s" for who, one in case.items()})


if __name__ == "__main__":
    app.run(main)
