"""Our half of published_evaluation.py: the published checkpoints converted, prepared, evaluated.

The protocol runs as `evaluate --suite --protocol=published` runs it; only the noise is that of the
published code: `labelled_phases` looks a window up and labels it with the masks, times and orders
that were recorded.
"""

import contextlib
import dataclasses
import pathlib
from unittest import mock

import jax.numpy as jnp
import numpy as np

from benchmarks import published_evaluation_cases as cases_lib
from benchmarks.published_evaluation_cases import Case
from esolm_jax import config as config_lib
from esolm_jax.data import build as build_data
from esolm_jax.data.manifest import Manifest, load_manifest
from esolm_jax.data.reader import eval_batches
from esolm_jax.evaluation import protocol, published_bound, window_noise
from esolm_jax.evaluation.protocol import published_nelbo
from esolm_jax.evaluation.suite import suite_data, suite_file, suite_run
from esolm_jax.family.phase import is_exact
from esolm_jax.interop.published import config as published_config
from esolm_jax.interop.published import file as published_file
from esolm_jax.interop.published import names as published_names
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
class Record:
    """What the published code did in one case.

    Attributes:
      batches: of each, x and valid [B, L], its noise, the nll of its tokens in text order, and
        loss, nll and tokens as that code sums them.
      final: nll and ppl.
    """

    batches: list[dict]
    final: dict[str, float]

    @classmethod
    def read(cls, path: pathlib.Path) -> "Record":
        with np.load(path) as file:
            saved = dict(file)
        batches: list[dict] = [{} for _ in range(int(saved.pop("batches")))]
        final = {}
        for name, value in saved.items():
            index, _, key = name.partition(".")
            if index == "final":
                final[key] = float(value)
            else:
                batches[int(index)][key] = value
        return cls(batches, final)

    @property
    def windows(self) -> np.ndarray:
        """All windows, int [N, L], in the order in which they were read."""
        return np.concatenate([batch["x"] for batch in self.batches])

    def window_nll(self) -> list[np.ndarray]:
        """Nats of each window of each batch, of the term that it feeds."""
        return [np.concatenate(_row_sums(batch)) for batch in self.batches]


def _row_sums(batch: dict) -> list[np.ndarray]:
    """Of the diffusion rows and of the sequential rows, those that there are."""
    found, start = [], 0
    for name in ("diffusion_nll", "sequential_nll"):
        if name in batch:
            nll = np.asarray(batch[name], np.float64)
            valid = batch["valid"][start : start + len(nll), -nll.shape[1] :]
            found.append((nll * valid).sum(axis=1))
            start += len(nll)
    return found


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What our code did in one case: windows int [N, L], nats of each window by batch, sums of each
    batch, and figures of the whole (nll_per_token, perplexity)."""

    windows: np.ndarray
    window_nll: list[np.ndarray]
    sums: list[published_nelbo.BatchNelbo]
    nll: float
    perplexity: float


# The recorded noise.


def _noise_table(records: list[Record], mask: int) -> dict[str, np.ndarray]:
    """Of all windows: x, and the noise of each phase [N, …]; a window that did not feed a phase is
    all masked, in text order, at time 1. ValueError: two windows are equal."""
    rows: dict[str, list[np.ndarray]] = {}
    for batch in (batch for record in records for batch in record.batches):
        x = batch["x"]
        first = len(batch.get("t", ()))
        in_order = np.broadcast_to(np.arange(x.shape[1]), x.shape)
        for phase, noisy in (("diffusion", "xt"), ("sequential", "z0")):
            own = slice(0, first) if phase == "diffusion" else slice(first, None)
            masked, order = np.ones(x.shape, bool), in_order.copy()
            if noisy in batch:
                masked[own] = batch[noisy] == mask
                order[own] = batch.get(f"{phase}_order", order[own])
            rows.setdefault(f"{phase}_masked", []).append(masked)
            rows.setdefault(f"{phase}_order", []).append(order)
        t = np.ones(len(x), np.float32)
        t[:first] = batch.get("t", ())
        rows.setdefault("t", []).append(t)
        rows.setdefault("x", []).append(x)
    table = {name: np.concatenate(parts) for name, parts in rows.items()}
    if len(np.unique(table["x"], axis=0)) < len(table["x"]):
        raise ValueError("the texts make two equal windows, whose noise cannot be told apart")
    return table


@contextlib.contextmanager
def recorded_noise(records: list[Record], mask: int):
    """Within it, the protocol labels windows with the noise of the published code."""
    table = {name: jnp.asarray(a) for name, a in _noise_table(records, mask).items()}

    def labelled_phases(config, built, key, offset_B, window_B, x, valid):
        del key, offset_B, window_B, valid
        row_B = (x[:, None] == table["x"][None]).all(axis=-1).argmax(axis=1)
        mine = {name: array[row_B] for name, array in table.items()}
        phases = ["diffusion"] * (config.alpha_0 > 0) + ["sequential"] * (config.alpha_0 < 1)
        labelled = []
        for phase in phases:
            t_B = mine["t"] if phase == "diffusion" else None
            noise = published_nelbo.Noise(mine[f"{phase}_masked"], mine[f"{phase}_order"], t_B)
            settings = {"alpha_0": config.alpha_0, "mask": built.special.mask}
            labelled.append(published_nelbo.label(config.objective, x, noise, **settings))
        return labelled

    with mock.patch.object(window_noise, "labelled_phases", labelled_phases):
        yield


# The converted model.


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
        if is_exact(self.config) and self.config.objective == "ar":
            return contextlib.nullcontext()  # it has none
        return recorded_noise(records, self.trained.built.special.mask)


@contextlib.contextmanager
def collecting():
    """Collects (nats of the rows that are summed, sums) of each batch."""
    found: list = []
    sums = published_bound._sums

    def collect(nll_PB, count_B, first):
        made = sums(nll_PB, count_B, first)
        rows = int((count_B > 0).sum())
        found.append((np.concatenate([nll_PB[0][:first], nll_PB[-1][first:rows]]), made))
        return made

    with mock.patch.object(published_bound, "_sums", collect):
        yield found


def _windows(manifest: Manifest) -> np.ndarray:
    """All windows of the prepared data, int32 [N, L]."""
    batches = eval_batches(manifest, suite_run.SPLIT, batch_size=cases_lib.ROWS)
    return np.concatenate([batch["x"][batch["valid"].any(axis=1)] for batch in batches])


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
        count = -(-len(windows) // cases_lib.ROWS)
        mine, found = found[:count], found[count:]
        outcomes[name] = _outcome(windows, mine, figures)
    return outcomes


def _outcome(windows, collected, figures: dict) -> Outcome:
    nll, sums = zip(*collected, strict=True)
    return Outcome(windows, list(nll), list(sums), figures["nll_per_token"], figures["perplexity"])


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
    windows = _windows(manifest)
    batches = []
    for theirs in record.batches:
        x = np.full((cases_lib.ROWS, windows.shape[1]), manifest.pad_id, np.int32)
        valid = np.zeros(x.shape, bool)
        rows = (theirs["x"][:, None] == windows[None]).all(axis=-1).argmax(axis=1)
        x[: len(rows)], valid[: len(rows)] = windows[rows], True
        batches.append({"x": x, "valid": valid})
    with model.noise([record]), collecting() as found:
        estimate = published_bound.make(model.config, model.trained.built)
        split = manifest.split(suite_run.SPLIT)
        result = estimate(model.trained.params, batches, split=split, seed=0)
    in_order = np.concatenate([b["x"][b["valid"].any(axis=1)] for b in batches])
    return _outcome(in_order, found, result.figures)


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
    """MDLM on padded windows, from Python alone: `load_published`, `protocol.windows_with_mask` and
    the published sums."""
    published = published_file.read(str(checkpoint))
    heads = published_config.get_config(str(checkpoint)).model.heads
    model = published_names.load(published.ema(), heads, mask_id=_mask_of(cases_lib.BERT))
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
    return Outcome(windows, nll_rows, sums, figures["nll"], figures["perplexity"])


def _mask_of(folder: pathlib.Path) -> int:
    return (folder / "vocab.txt").read_text().split().index("[MASK]")


def suite_name(case: Case) -> str:
    """The name of a case's data set in its suite."""
    return case.data.split(" ")[0]
