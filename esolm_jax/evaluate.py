"""python -m esolm_jax.evaluate --workdir=DIR: perplexity bounds of the checkpoint in DIR.

--step=N|best|latest   which checkpoint (default: latest)
--verify               only check whether every file of the workdir is what was written

evaluate.json is the last evaluation; evaluations.jsonl has a line of each.
"""

import datetime
import math
import pathlib
import re
import sys

from absl import flags

import esolm_jax
from esolm_jax import cli, memory_limit, results, verify
from esolm_jax import config as config_lib
from esolm_jax.data.manifest import Manifest, load_data
from esolm_jax.data.reader import num_windows
from esolm_jax.errors import UserError
from esolm_jax.evaluation import likelihood, provenance
from esolm_jax.evaluation.batches import eval_batches
from esolm_jax.evaluation.likelihood import Estimate
from esolm_jax.family.phase import is_exact
from esolm_jax.model import build
from esolm_jax.parallel import distributed, sharding
from esolm_jax.process import jax_settings
from esolm_jax.training import checkpoint, restore

FILE, HISTORY = "evaluate.json", "evaluations.jsonl"


def _finite(value: float) -> float | None:
    return None if math.isnan(value) else value


def _figures(bound: str, estimate: Estimate, split: dict, **settings) -> dict:
    """An estimate as perplexity, bits per token and bits per byte.

    `split`: the manifest's entry. Raises UserError if the estimate is not finite.
    """
    if not math.isfinite(estimate.nll):
        raise UserError(
            f"{bound}: is {estimate.nll}, although all weights are finite: activations "
            "overflow; evaluate an earlier step (--step=N), or with --config.model.dtype=float32"
        )
    bits = estimate.nll / math.log(2)
    is_whole = len(estimate.window_nll) == split["windows"]
    return {
        "bound": bound,
        "num_samples": None,
        "num_orders": None,
        **settings,
        "nll_per_token": estimate.nll,
        "standard_error": _finite(estimate.standard_error),
        "standard_error_differences": estimate.error_samples,
        "standard_error_note": _error_note(bound, estimate),
        "standard_error_of_split": None
        if is_whole
        else _finite(estimate.error_for(split["windows"])),
        "perplexity": estimate.perplexity,
        "bits_per_token": bits,
        "bits_per_byte": bits * split["tokens"] / split["bytes"],
        "bits_per_byte_note": "" if is_whole else "with the bytes per token of the whole split",
        "num_tokens": estimate.num_tokens,
    }


def _error_note(bound: str, estimate: Estimate) -> str:
    """The meaning of `standard_error`, or why it is missing."""
    if bound == "exact":
        return "an exact likelihood"
    if math.isnan(estimate.standard_error):
        field = "eval.num_samples" if bound == "nelbo" else "eval.num_orders"
        return f"unknown from one draw of each window; set config.{field} to 2 or more"
    return "Monte Carlo: of other draws of noise for the same windows, in nats per token"


def evaluate(config, workdir: pathlib.Path) -> dict:
    """All bounds that the config asks for, as a JSON-able dict.

    Raises:
      UserError: the data or their tokenizer are not the model's; a bound the family has not.
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
    split = manifest.split(e.split)
    windows = num_windows(manifest, e.split, e.max_windows)

    def batches():
        return eval_batches(config, manifest, e.split, e.max_windows, mesh)

    common = {"seed": config.seed, "total": math.ceil(windows / e.batch_size)}
    estimate = likelihood.make_nelbo(config, trained.built)(
        trained.params, batches(), num_samples=e.num_samples, progress="NELBO", **common
    )
    exact = is_exact(config)
    bounds = [
        _figures(
            "exact" if exact else "nelbo",
            estimate,
            split,
            num_samples=1 if exact else e.num_samples,
        )
    ]
    if e.num_orders and not exact:
        importance_weighted = likelihood.make_importance_weighted(config, trained.built)
        estimate = importance_weighted(
            trained.params, batches(), num_orders=e.num_orders, progress="any-order", **common
        )
        bounds.append(_figures("importance_weighted", estimate, split, num_orders=e.num_orders))
    return {
        "split": e.split,
        "windows": windows,
        "num_tokens": estimate.num_tokens,
        "results": bounds,
        **_unigram(manifest, trained.meta, e),
        "data": provenance.evaluated_data(manifest, e.split, windows),
        "batch_size": e.batch_size,
        "objective": config.objective,
        "alpha_0": config.alpha_0,
        "trained_alpha_0": checkpoint.config_in(trained.meta).alpha_0,
        "weights": e.weights,
        "step": trained.step,
        "checkpoint_sha256": digest,
        "seed": config.seed,
        "jax_settings": jax_settings.recorded(),
        "esolm_jax": esolm_jax.__version__,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _digest(workdir: pathlib.Path, step: int) -> str | None:
    """The checkpoint's digest; None if it has none, or a running `train` deleted it."""
    try:
        return checkpoint.digest_of(workdir, step)
    except UserError:
        return None


def _unigram(manifest: Manifest, meta: dict, e) -> dict:
    value, note = provenance.unigram(manifest, meta, e.split, e.max_windows)
    return {"unigram_perplexity": value, "unigram_note": note}


def _line(result: dict) -> str:
    """A bound in one line; an error without a remark is Monte Carlo noise."""
    text = f"{result['bound']}: perplexity {result['perplexity']:.2f}, "
    text += f"{result['nll_per_token']:.4f} nats per token"
    if result["standard_error"]:
        few = result["standard_error_differences"]
        roughly = f", from {few} difference{'s' * (few > 1)}" if few < 10 else ""
        text += f" ± {result['standard_error']:.4f} (Monte Carlo{roughly})"
    if result["standard_error_of_split"]:
        text += f" ± {result['standard_error_of_split']:.4f} (as a figure of the whole split)"
    about = "about " if result["bits_per_byte_note"] else ""
    return text + f", {about}{result['bits_per_byte']:.3f} bits per byte"


def _what_of(figures: dict) -> str:
    data = figures["data"]
    count = f"{figures['windows']:,}"
    if data["whole_split"]:
        which = f"all {count} windows of the {data['split']} split"
    else:
        which = f"{count} of the {data['split_windows']:,} windows of the {data['split']} split"
    text = f"on {figures['num_tokens']:,} tokens: {which}"
    if figures["unigram_perplexity"] is None:
        return f"{text}; no unigram perplexity: {figures['unigram_note']}"
    return f"{text}; a unigram model has perplexity {figures['unigram_perplexity']:.1f}"


def define_flags() -> None:
    flags.DEFINE_bool("verify", False, "Only check every file of the workdir: see verify.py.")


def default_config(flag: cli.FlagValue) -> str | None:
    """A config for --verify that does not depend on the workdir."""
    del flag
    asked = any(re.fullmatch("--?verify(=.*)?", arg) for arg in sys.argv)
    return verify.__file__ if asked else None


def main(config, workdir: pathlib.Path) -> None:
    if "verify" in flags.FLAGS and flags.FLAGS["verify"].value:
        distributed.on_main(lambda: verify.main(config, workdir))
        return
    path, history = workdir / FILE, workdir / HISTORY
    results.check_can_write(path, history)
    figures = evaluate(config, workdir)
    if distributed.is_main():  # all processes have the same figures
        results.write_json(path, figures)
        provenance.append_line(history, figures)
    for result in figures["results"]:
        print(_line(result))
    print(_what_of(figures))
    print(f"wrote {path}, and a line in {history}")
    fits = cli.mesh_flags(config, sharding.make_mesh(config.mesh), sampling=True)
    print(cli.next_command("sample", workdir, *fits, keep=cli.PLACES))


CLI = {
    "reads_checkpoint": True,
    "define_flags": define_flags,
    "default_config": default_config,
}

if __name__ == "__main__":
    cli.run(main, **CLI)
