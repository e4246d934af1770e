"""Our half of published_evaluation.py: the published checkpoints converted, prepared, evaluated.

The protocol runs as `evaluate --suite --protocol=published` runs it; only the noise is that of the
published code: `labelled_phases` looks a window up and labels it with the masks, times and orders
that were recorded.
"""

import contextlib
import dataclasses
import pathlib

import numpy as np

import esolm_jax
from benchmarks import published_evaluation_cases as cases_lib
from benchmarks.published_evaluation_cases import Case
from benchmarks.published_evaluation_record import Outcome, Record, collecting, recorded_noise
from esolm_jax import config as config_lib
from esolm_jax.data import build as build_data
from esolm_jax.data.manifest import Manifest, load_manifest
from esolm_jax.data.reader import eval_batches
from esolm_jax.evaluation import protocol, published_bound
from esolm_jax.evaluation.protocol import published_nelbo
from esolm_jax.evaluation.suite import suite_data, suite_file, suite_run
from esolm_jax.interop.published import config as published_config
from esolm_jax.interop.published import file as published_file
from esolm_jax.interop.published import read as published_read
from esolm_jax.model import lm_head
from esolm_jax.model import transformer as model_lib
from esolm_jax.parallel import sharding
from esolm_jax.training import checkpoint_meta, restore

SUITES = {  # of data sets that the published models are trained on
    "openwebtext": """
[data.openwebtext]
origin = "invented"
folder = "openwebtext"
split = "train"
range = "[-100000:]"
document_end = "eos"
window_specials = "none"
""",
    "lm1b": """
[data.lm1b]
origin = "invented"
folder = "lm1b"
split = "test"
detokenizer = "lm1b"
document_end = "bos"
window_specials = "bos_bos"
""",
}


@dataclasses.dataclass(frozen=True)
class Converted:
    """A published checkpoint as a workdir, and its model."""

    config: object
    workdir: pathlib.Path
    trained: restore.TrainedModel

    @classmethod
    def of(cls, checkpoint: pathlib.Path, workdir: pathlib.Path, tokenizer: str) -> "Converted":
        config = published_config.get_config(str(checkpoint))
        config = config_lib.overridden(config, {"mesh.devices": 1})
        published_read.convert(config, str(checkpoint), workdir, tokenizer, "both")
        fields = {"eval.batch_size": cases_lib.ROWS, "mesh.devices": 1}
        config = config_lib.overridden(checkpoint_meta.saved_config(workdir), fields)
        mesh = sharding.make_mesh(config.mesh)
        trained = restore.load_trained(config, workdir, config.eval.weights, mesh)
        return cls(config, workdir, trained)

    def noise(self, records: list[Record]):
        if self.config.objective == "ar":
            return contextlib.nullcontext()  # it has none
        return recorded_noise(records, self.trained.built.special.mask)


def _windows(manifest: Manifest) -> tuple[np.ndarray, np.ndarray]:
    """All windows of the prepared data, int32 [N, L], and which tokens are no padding."""
    batches = eval_batches(manifest, suite_run.SPLIT, batch_size=cases_lib.ROWS)
    x, valid = map(np.concatenate, zip(*((b["x"], b["valid"]) for b in batches), strict=True))
    there = valid.any(axis=1)
    return x[there], valid[there]


def evaluate_suite(
    model: Converted,
    root: pathlib.Path,
    suite: suite_file.Suite,
    records: dict[str, Record],
    shards: int = 1,
) -> dict[str, Outcome]:
    """`evaluate --suite --protocol=published` of the data sets that have a record; the outcome of
    each by its name."""
    sets = tuple(one for one in suite.data_sets if one.name in records)
    suite = dataclasses.replace(suite, name=f"{suite.name}-{shards}", data_sets=sets)
    config = config_lib.overridden(model.config, {"data.window_shards": shards})
    weights = {"step": model.trained.step, "checkpoint_sha256": None, "weights": "ema"}
    request = suite_run.Request(suite, root, suite_data.find(sets, root), "published", weights)
    with model.noise(list(records.values())), collecting() as found:
        report = suite_run.evaluate(config, model.workdir, request, model.trained)
    outcomes = {}
    for entry in report["data_sets"]:
        name, (figures,) = entry["name"], entry["results"]
        folder = model.workdir / "suites" / suite.name / "data"
        windows = _windows(load_manifest(folder / f"{name}-{cases_lib.LENGTH}-published"))
        count = -(-len(windows[0]) // cases_lib.ROWS)
        mine, found = found[:count], found[count:]
        outcomes[name] = _outcome(windows, mine, figures)
    return outcomes


def _outcome(windows: tuple, collected: list, figures: dict) -> Outcome:
    nll, sums = zip(*collected, strict=True)
    return Outcome(*windows, list(nll), list(sums), figures["nll_per_token"])


def prepared(model: Converted, root: pathlib.Path, suite: suite_file.Suite, name: str) -> Manifest:
    """One data set of a suite, prepared with the published windows."""
    sets = tuple(one for one in suite.data_sets if one.name == name)
    suite = dataclasses.replace(suite, name="shuffled", data_sets=sets)
    request = suite_run.Request(suite, root, suite_data.find(sets, root), "published", {})
    ((_, manifest),) = suite_run.prepared(
        model.config, model.workdir, request, model.trained
    ).values()
    return manifest


def evaluate_prepared(model: Converted, manifest: Manifest, record: Record) -> Outcome:
    """The published bound of prepared data, with windows in batches as the record has them."""
    windows, valid = _windows(manifest)
    if len(windows) != len(record.windows):
        raise SystemExit(f"{len(windows)} windows, {len(record.windows)} published")
    place = (record.windows[:, None] == windows[None]).all(axis=-1).argmax(axis=1)
    windows, valid = windows[place], valid[place]
    batches, start = [], 0
    for theirs in record.batches:
        rows = slice(start, start + len(theirs["x"]))
        start = rows.stop
        empty = np.zeros((cases_lib.ROWS - len(theirs["x"]), windows.shape[1]), np.int32)
        x, there = (np.concatenate([a[rows], empty]) for a in (windows, valid))
        batches.append({"x": x, "valid": there.astype(bool)})
    with model.noise([record]), collecting() as found:
        estimate = published_bound.make(model.config, model.trained.built)
        split = manifest.split(suite_run.SPLIT)
        result = estimate(model.trained.params, batches, split=split, seed=0)
    return _outcome((windows, valid), found, result.figures)


def prepare_text8(model: Converted, path: pathlib.Path) -> Manifest:
    """text8 with the windows of the published defaults (configs/text8.py)."""
    fields = {
        "data.source": "text8",
        "data.train": str(path),
        "data.validation": "",
        "data.test": "",
        "data.document_end": "eos",
        "data.window_specials": "bos_eos",
        "data.window_mode": "published",
        "data.tokenizer": "text8",
        "data.tokenizer_path": "",
    }
    config = config_lib.overridden(model.config, fields)
    return build_data.prepare(config, model.workdir / "text8", progress=False)


def evaluate_padded(checkpoint: pathlib.Path, texts: list[str], record: Record) -> Outcome:
    """MDLM on padded windows: `load_published`, `protocol.windows_with_mask`, published sums."""
    published = published_file.read(str(checkpoint))
    heads = published_config.get_config(str(checkpoint)).model.heads
    model = esolm_jax.load_published(published.ema(), heads, mask_id=_mask_of(cases_lib.BERT))
    settings = protocol.WindowSettings("lm1b", wrap=False, block_size=cases_lib.LENGTH)
    windows, valid = protocol.windows_with_mask(texts, cases_lib.BERT, settings)
    head = lm_head.Head.of(model.config, model.mask_id)
    apply = model_lib.bind(model.config)
    nll_rows, sums, start = [], [], 0
    for batch in record.batches:
        x = windows[start : start + len(batch["x"])]
        mine = valid[start : start + len(x)]
        start += len(x)
        noise = published_nelbo.Noise(batch["xt"] == model.mask_id, None, batch["t"])
        labelled = published_nelbo.label("mdlm", x, noise, alpha_0=1.0, mask=model.mask_id)
        nll = np.asarray(published_nelbo.token_nll(apply, head, model.params, labelled))
        sums.append(published_nelbo.BatchNelbo.of(mine, nll))
        nll_rows.append((np.asarray(nll, np.float64) * mine).sum(axis=1))
    figures = published_nelbo.nelbo_figures(sums)
    return Outcome(windows, valid == 1, nll_rows, sums, figures["nll"])


def _mask_of(folder: pathlib.Path) -> int:
    return (folder / "vocab.txt").read_text().split().index("[MASK]")


def suite_name(case: Case) -> str:
    """The name of a case's data set in its suite."""
    return case.data.split(" ")[0]
