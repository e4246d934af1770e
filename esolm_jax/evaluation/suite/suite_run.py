"""Evaluates the data sets of a suite, each once: results that are done are kept."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

from esolm_jax import results
from esolm_jax.config import METRICS
from esolm_jax.data.manifest import Manifest, load_manifest
from esolm_jax.data.reader import num_windows
from esolm_jax.errors import UserError
from esolm_jax.evaluation import bounds, provenance, published_bound, window_noise
from esolm_jax.evaluation.batches import eval_batches
from esolm_jax.evaluation.metric import Result, check_finite
from esolm_jax.evaluation.suite import suite_data, suite_report
from esolm_jax.evaluation.suite.suite_file import DataSet, Suite
from esolm_jax.family.phase import is_exact
from esolm_jax.parallel import distributed, multihost
from esolm_jax.process import jax_settings
from esolm_jax.training import restore

SPLIT = "test"  # of the prepared data
PROTOCOLS = {"all": "all", "published": "published"}  # --protocol → config.data.window_mode
_VERSION = 2  # of the estimators; results of another version are made again


@dataclasses.dataclass(frozen=True)
class Request:
    """What to evaluate.

    Attributes:
      files: the files of each data set, by name; [] if they are missing.
      protocol: "all": every window has all terms of the NELBO; "published": the κ-split.
      checkpoint: identifies the weights, JSON-able.
    """

    suite: Suite
    root: pathlib.Path
    files: dict[str, list[pathlib.Path]]
    protocol: str
    checkpoint: dict[str, Any]

    @property
    def present(self) -> list[DataSet]:
        return [one for one in self.suite.data_sets if self.files[one.name]]

    @property
    def missing(self) -> list[str]:
        """A line on each data set without files."""
        return [
            suite_data.missing_note(one, self.root)
            for one in self.suite.data_sets
            if not self.files[one.name]
        ]

    def folder(self, workdir: pathlib.Path) -> pathlib.Path:
        """The folder of the results."""
        return workdir / "suites" / self.suite.name / self.protocol


def evaluate(
    config, workdir: pathlib.Path, request: Request, trained: restore.TrainedModel
) -> dict:
    """Prepares and evaluates what is missing; writes and returns the report.

    Raises:
      UserError: bad data, or a last batch that the published protocol cannot split.
    """
    manifests = prepared(config, workdir, request, trained)
    windows = {
        name: num_windows(manifest, SPLIT, config.eval.max_windows)
        for name, (_, manifest) in manifests.items()
    }
    if request.protocol == "published":
        for count in windows.values():
            published_bound.check_batches(config, count)
    bounds_of_suite = list(estimators(config, request.protocol, trained))
    if not bounds_of_suite:
        raise UserError(
            f"config.eval.metrics={config.eval.metrics!r}: must have nelbo, or importance_weighted "
            "and config.eval.num_orders, because a suite has these"
        )
    folder, entries = request.folder(workdir), []
    if distributed.is_main():
        folder.mkdir(parents=True, exist_ok=True)
    for data_set in request.present:
        made_config, manifest = manifests[data_set.name]
        path = folder / f"{data_set.name}.json"
        identity = _identity(config, request, manifest, windows[data_set.name])
        entry = _done(path, identity)
        if entry is None:
            found = _evaluate(made_config, manifest, trained, bounds_of_suite, data_set)
            entry = {"name": data_set.name, "title": data_set.title, "origin": data_set.origin}
            entry |= {"windows": windows[data_set.name], "results": found}
            entry["data"] = provenance.evaluated_data(manifest, SPLIT, windows[data_set.name])
            if distributed.is_main():
                results.write_json(path, {"identity": identity, "entry": entry})
        else:
            print(f"{data_set.title}: done before ({path})")
        for result in entry["results"]:
            print(f"{data_set.title}: {result['summary']}")
        entries.append(entry)
    report = _report(config, request, entries)
    if distributed.is_main():
        suite_report.write(folder, report, request.suite)
    return report


def prepared(
    config, workdir: pathlib.Path, request: Request, trained: restore.TrainedModel
) -> dict[str, tuple[Any, Manifest]]:
    """(config, prepared data) of each data set that has files."""
    tokenizer = suite_data.tokenizer_files(workdir, trained.meta["tokenizer"]["kind"])
    mode, name = PROTOCOLS[request.protocol], request.suite.name
    made = {}
    for data_set in request.present:
        files = request.files[data_set.name]
        own = suite_data.config_of(config, data_set, files, tokenizer, mode)
        folder = suite_data.folder_of(own, workdir, name, data_set)
        _on_main(own, folder)
        manifest = load_manifest(folder)
        restore.check_same_tokenizer(manifest, trained.meta)
        made[data_set.name] = own, manifest
    return made


def _on_main(config, folder: pathlib.Path) -> None:
    multihost.on_main(lambda: suite_data.prepare(config, folder))


def estimators(
    config, protocol: str, trained: restore.TrainedModel
) -> Iterator[tuple[str, Callable[..., Result]]]:
    """(name, estimator) of each bound, as those of evaluation.metric."""
    if protocol == "published":
        yield "published_nelbo", published_bound.make(config, trained.built)
        return
    exact, e = is_exact(config), config.eval
    names = [name.strip() for name in e.metrics.split(",")]
    nelbo, draws = window_noise.make_nelbo(config, trained.built), 1 if exact else e.num_samples

    def run_nelbo(params, batches, *, split, **options) -> Result:
        drawn = nelbo(params, batches, num_samples=draws, **options)
        return bounds.result("exact" if exact else "nelbo", drawn, split, num_samples=draws)

    if METRICS[0] in names:
        yield "nelbo", run_nelbo
    if METRICS[1] in names and e.num_orders and not exact:
        weighted = window_noise.make_importance_weighted(config, trained.built)

        def run_weighted(params, batches, *, split, **options) -> Result:
            drawn = weighted(params, batches, num_orders=e.num_orders, **options)
            return bounds.result("importance_weighted", drawn, split, num_orders=e.num_orders)

        yield "importance_weighted", run_weighted


def _evaluate(config, manifest: Manifest, trained, made, data_set: DataSet) -> list[dict]:
    """The figures of each bound; `made`: of estimators()."""
    e, found = config.eval, []
    total = math.ceil(num_windows(manifest, SPLIT, e.max_windows) / e.batch_size)
    for name, estimate in made:
        result = estimate(
            trained.params,
            eval_batches(config, manifest, SPLIT, e.max_windows, trained.built.mesh),
            split=manifest.split(SPLIT),
            seed=config.seed,
            progress=f"{data_set.title}, {name}",
            total=total,
        )
        check_finite(result)
        found.append(result.figures | {"summary": result.line})
    return found


def _identity(config, request: Request, manifest: Manifest, windows: int) -> dict[str, Any]:
    """What a result depends on."""
    e = config.eval
    identity = {
        "version": _VERSION,
        **request.checkpoint,
        "protocol": request.protocol,
        "split_sha256": manifest.split(SPLIT)["sha256"],
        "windows": windows,
        "objective": config.objective,
        "alpha_0": config.alpha_0,
        "seed": config.seed,
        "dtype": config.model.dtype,
        "metrics": e.metrics,
        "num_samples": e.num_samples,
        "num_orders": e.num_orders,
    }
    if request.protocol == "published":  # other figures do not depend on these
        identity |= {"batch_size": e.batch_size, "kappa": config.kappa}
    return json.loads(results.dumps(identity))


def _done(path: pathlib.Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The entry of an earlier run with the same identity, the same in all processes."""
    try:
        saved = json.loads(path.read_text("utf-8"))
        entry = saved["entry"] if saved["identity"] == identity else None
    except (OSError, ValueError, LookupError, TypeError):
        entry = None
    return json.loads(multihost.from_main(json.dumps(entry)))


def _report(config, request: Request, entries: list[dict]) -> dict[str, Any]:
    return {
        "suite": request.suite.name,
        "title": request.suite.title,
        "protocol": request.protocol,
        **request.checkpoint,
        "objective": config.objective,
        "alpha_0": config.alpha_0,
        "seq_len": config.data.seq_len,
        "seed": config.seed,
        "batch_size": config.eval.batch_size,
        "data_sets": entries,
        "missing": request.missing,
        "published": [dataclasses.asdict(one) for one in request.suite.published],
        "jax_settings": jax_settings.recorded(),
    }
