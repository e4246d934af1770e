"""The data sets of a report, evaluated; see report_page for what is written.

Without a suite, the data set is the split of config.eval. With a suite, its data sets are the
domains.
"""

import dataclasses
import datetime
import math
import pathlib
import shlex
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import jax

import esolm_jax
from esolm_jax.config import METRICS
from esolm_jax.data.manifest import Manifest
from esolm_jax.data.reader import num_windows
from esolm_jax.errors import UserError
from esolm_jax.evaluation import bounds, provenance, window_noise
from esolm_jax.evaluation.batches import eval_batches
from esolm_jax.evaluation.likelihood import Estimate
from esolm_jax.evaluation.metric import check_finite
from esolm_jax.evaluation.report import statistics, window_sums
from esolm_jax.evaluation.report.window_sums import WindowSums
from esolm_jax.evaluation.suite import suite_run
from esolm_jax.family.phase import is_exact
from esolm_jax.parallel import multihost
from esolm_jax.process import jax_settings
from esolm_jax.training import checkpoint_meta
from esolm_jax.training.restore import TrainedModel


@dataclasses.dataclass(frozen=True)
class Domain:
    """Prepared data, of which `split` is evaluated. `title`: its name in tables."""

    name: str
    title: str
    origin: str
    config: Any
    manifest: Manifest
    split: str


def of_split(config, manifest: Manifest) -> list[Domain]:
    """The split of config.eval as the only domain."""
    split = config.eval.split
    return [Domain(split, f"{split} split", manifest.source, config, manifest, split)]


def of_suite(config, workdir: pathlib.Path, request: suite_run.Request, trained) -> list[Domain]:
    """The data sets of a suite, prepared on first use."""
    made = suite_run.prepared(config, workdir, request, trained)
    return [
        Domain(one.name, one.title, one.origin, *made[one.name], suite_run.SPLIT)
        for one in request.present
    ]


def check(config) -> None:
    """UserError unless the metrics are bounds that a report computes."""
    for name in config.eval.metrics.split(","):
        if name.strip() not in METRICS[:2]:
            raise UserError(
                f"config.eval.metrics={config.eval.metrics!r}: must be of nelbo and "
                "importance_weighted with --report, because a report has these bounds alone"
            )


def evaluate(config, trained: TrainedModel, domains: Sequence[Domain]) -> dict[str, Any]:
    """The report of the domains, as a JSON-able dict.

    Raises:
      UserError: a bound is not finite.
    """
    collect = window_sums.make(config, trained.built)
    entries, sums, weighted = [], [], []
    for domain in domains:
        one = _collected(collect, trained, domain)
        more = _importance_weighted(trained, domain)
        splits = [domain.manifest.split(domain.split)]
        entries.append(_about(domain, trained) | _figures(config, [one], more, splits))
        sums.append(one)
        weighted += more
    splits = [domain.manifest.split(domain.split) for domain in domains]
    whole = _figures(config, sums, weighted, splits)
    return {
        "objective": config.objective,
        "alpha_0": config.alpha_0,
        "trained_alpha_0": checkpoint_meta.config_in(trained.meta).alpha_0,
        "step": trained.step,
        "weights": config.eval.weights,
        "seq_len": config.data.seq_len,
        "draws": sums[0].draws,
        "data_sets": entries,
        "all": {"windows": sum(len(one.estimate.window_nll) for one in sums), **whole},
        "calibration_error": statistics.ECE,
        "seed": config.seed,
        "batch_size": config.eval.batch_size,
        **_code(),
        "devices": _devices(trained),
        "jax": jax.__version__,
        "jax_settings": jax_settings.recorded(),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _collected(collect, trained: TrainedModel, domain: Domain) -> WindowSums:
    e, manifest = domain.config.eval, domain.manifest
    windows = num_windows(manifest, domain.split, e.max_windows)
    return collect(
        trained.params,
        eval_batches(domain.config, manifest, domain.split, e.max_windows, trained.built.mesh),
        windows=windows,
        num_samples=e.num_samples,
        seed=domain.config.seed,
        progress=domain.title,
        total=math.ceil(windows / e.batch_size),
    )


def _importance_weighted(trained: TrainedModel, domain: Domain) -> list[Estimate]:
    """The importance-weighted bound, if config.eval asks for it."""
    e, manifest = domain.config.eval, domain.manifest
    if METRICS[1] not in e.metrics or not e.num_orders or is_exact(domain.config):
        return []
    estimate = window_noise.make_importance_weighted(domain.config, trained.built)
    windows = num_windows(manifest, domain.split, e.max_windows)
    found = estimate(
        trained.params,
        eval_batches(domain.config, manifest, domain.split, e.max_windows, trained.built.mesh),
        num_orders=e.num_orders,
        seed=domain.config.seed,
        progress=f"{domain.title}, importance-weighted",
        total=math.ceil(windows / e.batch_size),
    )
    return [found]


def _figures(
    config, sums: list[WindowSums], weighted: list[Estimate], splits: list[dict[str, Any]]
) -> dict[str, Any]:
    """Bounds, positions and calibration of one or several data sets. `splits`: the manifests'."""
    whole = {name: sum(split[name] for split in splits) for name in ("windows", "tokens", "bytes")}
    bound = "exact" if is_exact(config) else "nelbo"
    estimate = statistics.merged([one.estimate for one in sums])
    made = [bounds.result(bound, estimate, whole, num_samples=sums[0].draws)]
    if weighted:
        estimate, orders = statistics.merged(weighted), config.eval.num_orders
        made.append(bounds.result("importance_weighted", estimate, whole, num_orders=orders))
    return {
        "results": [check_finite(one).figures | {"summary": one.line} for one in made],
        "positions": statistics.positions(sums),
        "calibration": statistics.calibration(sums),
    }


def _about(domain: Domain, trained: TrainedModel) -> dict[str, Any]:
    """The data of a domain, and its unigram baseline."""
    manifest, split, most = domain.manifest, domain.split, domain.config.eval.max_windows
    windows = num_windows(manifest, split, most)
    unigram, note = provenance.unigram(manifest, trained.meta, split, most)
    return {
        "name": domain.name,
        "title": domain.title,
        "origin": domain.origin,
        "windows": windows,
        "unigram_perplexity": unigram,
        "unigram_note": note,
        "data": provenance.evaluated_data(manifest, split, windows),
    }


def _devices(trained: TrainedModel) -> str:
    """The number and kind of the devices of the mesh."""
    devices = trained.built.mesh.devices
    return f"{devices.size} {devices.flat[0].device_kind}"


def _code() -> dict[str, str]:
    """The command and the code that made the report."""
    name = pathlib.Path(sys.argv[0]).stem
    return {
        "command": shlex.join(["python", "-m", f"esolm_jax.{name}", *sys.argv[1:]]),
        "esolm_jax": esolm_jax.__version__,
        "commit": _commit(),
        "code_sha256": multihost.code_hash(),
    }


def _commit() -> str:
    """The commit of the checkout that holds this package, with "+" if its files were changed;
    "unknown" if it is in none."""
    folder = pathlib.Path(esolm_jax.__file__).parent

    def git(*args: str) -> str:
        command = ["git", "-C", str(folder), *args]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    try:
        if not git("ls-files", "__init__.py"):  # installed in a folder that git ignores
            return "unknown"
        changed = git("status", "--porcelain", "--", ".")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except OSError:  # git is missing
        return "unknown"
