"""python -m esolm_jax.evaluate --workdir=DIR: perplexity bounds of the checkpoint in DIR.

--step=N|best|latest   which checkpoint (default: latest)
--verify               only check every file of the workdir for damage
--answers=FILE         only log-likelihoods of answers, by LLaDA's or Dream's protocol, from
                       --draws draws of masks: see evaluation/answers.py
--suite=zeroshot|FILE  all data sets of a suite (evaluation/suite), from files below --data_root=DIR
--protocol=published   with --suite: the bound and the windows of the published code
--report               report.md, .json and .png instead: perplexity by position and by data set of
                       --suite, calibration of the predicted distributions (docs/report.md)

evaluate.json is the last evaluation; evaluations.jsonl has one line per evaluation. A suite's
results are in WORKDIR/suites; data sets that are done are not evaluated again.
"""

import dataclasses
import datetime
import math
import pathlib
import re
import sys
from collections.abc import Iterator

from absl import flags

import esolm_jax
from esolm_jax import cli, memory_limit, results, verify
from esolm_jax import config as config_lib
from esolm_jax.data.manifest import Manifest, load_data
from esolm_jax.data.reader import num_windows
from esolm_jax.errors import UserError, nearest
from esolm_jax.evaluation import answers, metrics, provenance
from esolm_jax.evaluation.batches import eval_batches
from esolm_jax.evaluation.metric import check_finite
from esolm_jax.evaluation.report import report_page, report_run
from esolm_jax.evaluation.suite import suite_data, suite_file, suite_report, suite_run
from esolm_jax.model import build
from esolm_jax.parallel import distributed, multihost, sharding
from esolm_jax.process import jax_settings
from esolm_jax.training import checkpoint_meta, restore

FILE, HISTORY = "evaluate.json", "evaluations.jsonl"


def evaluate(config, workdir: pathlib.Path) -> dict:
    """All metrics of config.eval.metrics, as a JSON-able dict.

    Raises:
      UserError: data or tokenizer of another model; a bound that the family lacks.
    """
    e = config.eval
    mesh = sharding.make_mesh(config.mesh)
    config_lib.validate_evaluation(config, sharding.num_row_shards(mesh))
    manifest = load_data(config, workdir)
    model = build.model_config(config, manifest.tokenizer, sharding.platform(mesh))
    memory_limit.check_evaluation(config, model, mesh)
    trained = restore.load_trained(config, workdir, e.weights, mesh, cli.step_flag())
    digest = _digest(workdir, trained.step)
    restore.check_same_tokenizer(manifest, trained.meta)
    windows = num_windows(manifest, e.split, e.max_windows)
    entries = list(_results(config, manifest, trained, windows))
    return {
        "split": e.split,
        "windows": windows,
        "num_tokens": next((r["num_tokens"] for r in entries if "num_tokens" in r), None),
        "results": entries,
        **_unigram(manifest, trained.meta, e),
        "data": provenance.evaluated_data(manifest, e.split, windows),
        "batch_size": e.batch_size,
        "objective": config.objective,
        "alpha_0": config.alpha_0,
        "trained_alpha_0": checkpoint_meta.config_in(trained.meta).alpha_0,
        "weights": e.weights,
        "step": trained.step,
        "checkpoint_sha256": digest,
        "seed": config.seed,
        "jax_settings": jax_settings.recorded(),
        "esolm_jax": esolm_jax.__version__,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def evaluate_suite(config, workdir: pathlib.Path, request: suite_run.Request) -> dict:
    """The report of a suite, as a JSON-able dict; see evaluation/suite.

    Raises:
      UserError: bad data of the suite, or a bound that the family lacks.
    """
    config, trained = _load(config, workdir, rounds_up=request.protocol == "all")
    checkpoint = {
        "step": trained.step,
        "checkpoint_sha256": _digest(workdir, trained.step),
        "weights": config.eval.weights,
    }
    request = dataclasses.replace(request, checkpoint=checkpoint)
    return suite_run.evaluate(config, workdir, request, trained)


def evaluate_report(config, workdir: pathlib.Path, request: suite_run.Request | None) -> dict:
    """The report of config.eval.split, or of the data sets of a suite, as a JSON-able dict; see
    evaluation/report.

    Raises:
      UserError: bad data, or data or tokenizer of another model.
    """
    report_run.check(config)
    config, trained = _load(config, workdir, rounds_up=True)
    if request is None:
        manifest = load_data(config, workdir)
        restore.check_same_tokenizer(manifest, trained.meta)
        domains = report_run.of_split(config, manifest)
    else:
        domains = report_run.of_suite(config, workdir, request, trained)
    published = request.suite.published if request else ()
    return {
        "checkpoint_sha256": _digest(workdir, trained.step),
        **report_run.evaluate(config, trained, domains),
        "missing": request.missing if request else [],
        "published": [dataclasses.asdict(one) for one in published],
    }


def _load(config, workdir: pathlib.Path, *, rounds_up: bool):
    """(config, trained model). `rounds_up`: figures do not depend on the batch size, so it becomes
    a multiple of the devices that shard rows; else `eval_batches` pads each batch."""
    mesh = sharding.make_mesh(config.mesh)
    if rounds_up:
        size = sharding.padded_rows(mesh, config.eval.batch_size)
        config = config_lib.overridden(config, {"eval.batch_size": size})
    config_lib.validate_evaluation(config, row_shards=1)
    meta = checkpoint_meta.read_meta(workdir, cli.step_flag())
    model = build.model_config(config, meta["tokenizer"], sharding.platform(mesh))
    memory_limit.check_evaluation(config, model, mesh)
    trained = restore.load_trained(config, workdir, config.eval.weights, mesh, cli.step_flag())
    return config, trained


def _results(
    config, manifest: Manifest, trained: restore.TrainedModel, windows: int
) -> Iterator[dict]:
    """The figures of each metric, and the line that `main` prints."""
    e, built = config.eval, trained.built
    for metric in metrics.selected(e.metrics, config):
        estimate = metric.make(config, built, None)
        result = estimate(
            trained.params,
            eval_batches(config, manifest, e.split, e.max_windows, built.mesh),
            split=manifest.split(e.split),
            seed=config.seed,
            progress=metric.name,
            total=math.ceil(windows / e.batch_size),
        )
        check_finite(result)
        yield result.figures | {"summary": result.line}


def _digest(workdir: pathlib.Path, step: int) -> str | None:
    """The checkpoint's digest; None if it has none, or a running `train` deleted it."""
    try:
        return checkpoint_meta.digest_of(workdir, step)
    except UserError:
        return None


def _unigram(manifest: Manifest, meta: dict, e) -> dict:
    value, note = provenance.unigram(manifest, meta, e.split, e.max_windows)
    return {"unigram_perplexity": value, "unigram_note": note}


def _what_of(figures: dict) -> str:
    data = figures["data"]
    count = f"{figures['windows']:,}"
    if data["whole_split"]:
        which = f"all {count} windows of the {data['split']} split"
    else:
        which = f"{count} of the {data['split_windows']:,} windows of the {data['split']} split"
    tokens = figures["num_tokens"]
    text = f"on {which}" if tokens is None else f"on {tokens:,} tokens: {which}"
    if figures["unigram_perplexity"] is None:
        return f"{text}; no unigram perplexity: {figures['unigram_note']}"
    return f"{text}; a unigram model has perplexity {figures['unigram_perplexity']:.1f}"


def define_flags() -> None:
    flags.DEFINE_bool("verify", False, "Only check every file of the workdir: see verify.py.")
    flags.DEFINE_string("answers", None, "A .jsonl of prompts and answers: only score these.")
    flags.DEFINE_integer("draws", 128, "With --answers: draws of masks of an answer.", 1, 2**16)
    flags.DEFINE_string("suite", "", "A suite of data sets: zeroshot, or a TOML file.")
    flags.DEFINE_string("data_root", "", "Folder with the files of the suite's data sets.")
    flags.DEFINE_string("protocol", "all", "all or published: see evaluation/suite.")
    flags.DEFINE_bool("report", False, "Write a report: see evaluation/report.")


def _wants_report() -> bool:
    """The flag --report. UserError: another flag excludes it."""
    if not cli.flag("report", False):
        return False
    others = {
        "--verify": cli.flag("verify", False) and "a report evaluates the model",
        "--answers": cli.flag("answers", "") and "a report is of windows of data sets",
        "--protocol=published": cli.flag("protocol", "") == "published"
        and "the noise of a report belongs to the windows",
    }
    for name, reason in others.items():
        if reason:
            raise UserError(f"--report: must be given without {name}, because {reason}")
    return True


def suite_request() -> suite_run.Request | None:
    """The suite that the flags ask for, or None.

    Raises:
      UserError: a flag is missing or wrong, or no data set has files.
    """
    suite, root, protocol = (cli.flag(n, "") for n in ("suite", "data_root", "protocol"))
    if not suite:
        if root or protocol not in ("", "all"):
            raise UserError("--suite is missing: --data_root and --protocol belong to a suite")
        return None
    if protocol not in suite_run.PROTOCOLS:
        names = list(suite_run.PROTOCOLS)
        raise UserError(
            f"--protocol={protocol}: must be {' or '.join(names)}{nearest(protocol, names)}"
        )
    read = suite_file.read(suite)
    if not root:
        raise UserError(f"--data_root is missing: the folder with the files of --suite={suite}")
    path = pathlib.Path(root).expanduser().absolute()
    return suite_run.Request(read, path, suite_data.find(read.data_sets, path), protocol, {})


def _main_suite(config, workdir: pathlib.Path, request: suite_run.Request) -> None:
    for note in request.missing:
        print(f"missing: {note}")
    report = evaluate_suite(config, workdir, request)
    print("\n".join(suite_report.table(report)))
    folder = request.folder(workdir)
    print(f"wrote {folder}: report.json, report.md, report.png")


def _main_report(config, workdir: pathlib.Path, request: suite_run.Request | None) -> None:
    results.check_can_write(*report_page.paths(workdir))
    for note in request.missing if request else ():
        print(f"missing: {note}")
    report = evaluate_report(config, workdir, request)
    if distributed.is_main():  # all processes have the same figures
        report_page.write(workdir, report)
    print("\n".join(report_page.bounds_table(report)))
    first = report["all"]["calibration"][0]
    print(
        f"expected calibration error {first['ece']:.4f} of {first['predictions']:,} predictions; "
        f"mean entropy {first['mean_entropy']:.4f}, mean NLL {first['mean_nll']:.4f}"
    )
    print(f"wrote {', '.join(map(str, report_page.paths(workdir)))}")
    print(_next_sample(config, workdir))


def _next_sample(config, workdir: pathlib.Path) -> str:
    fits = cli.mesh_flags(config, sharding.make_mesh(config.mesh), sampling=True)
    return cli.next_command("sample", workdir, *fits, keep=cli.CHECKPOINT_DATA_AND_DEVICES)


def default_config(flag: cli.FlagValue) -> str | None:
    """A config for --verify that does not depend on the workdir."""
    del flag
    asked = any(re.fullmatch("--?verify(=.*)?", arg) for arg in sys.argv)
    return verify.__file__ if asked else None


def _score_answers(config, workdir: pathlib.Path, file: pathlib.Path) -> None:
    pairs = answers.read(file)
    results.check_can_write(workdir / answers.FILE)
    config, trained = _load(config, workdir, rounds_up=False)
    tokenizer = restore.load_tokenizer(workdir, trained.meta)
    scored = answers.score(config, trained, tokenizer, pairs, flags.FLAGS["draws"].value)
    for row in scored:
        print(f"{row['log_likelihood']:.4f} nats of {row['tokens']} tokens: {row['answer'][:60]!r}")
    if distributed.is_main():
        print(f"wrote {answers.write(workdir, scored)}")


def main(config, workdir: pathlib.Path) -> None:
    wants_report = _wants_report()
    if cli.flag("verify", False):
        multihost.on_main(lambda: verify.main(config, workdir))
        return
    if file := cli.flag("answers", ""):
        _score_answers(config, workdir, pathlib.Path(file))
        return
    request = suite_request()
    if wants_report:
        _main_report(config, workdir, request)
        return
    if request:
        _main_suite(config, workdir, request)
        return
    path, history = workdir / FILE, workdir / HISTORY
    results.check_can_write(path, history)
    figures = evaluate(config, workdir)
    if distributed.is_main():  # all processes have the same figures
        results.write_json(path, figures)
        provenance.append_line(history, figures)
    for result in figures["results"]:
        print(result["summary"])
    print(_what_of(figures))
    print(f"wrote {path}, and a line in {history}")
    print(_next_sample(config, workdir))


CLI = cli.Verb(reads_checkpoint=True, define_flags=define_flags, default_config=default_config)

if __name__ == "__main__":
    cli.run(main, CLI)
