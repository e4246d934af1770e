"""python -m esolm_jax.evaluate --workdir=DIR: perplexity bounds of the checkpoint in DIR.

--step=N|best|latest   which checkpoint (default: latest)
--verify               only check whether every file of the workdir is what was written
"""

import math
import pathlib
import re
import sys

from absl import flags

from esolm_jax import (
    assemble,
    cli,
    distributed,
    jax_settings,
    likelihood,
    memory_limit,
    objectives,
    results,
    sharding,
    verify,
)
from esolm_jax import config as config_lib
from esolm_jax.data.reader import num_windows, unigram_perplexity
from esolm_jax.likelihood import Estimate


def _figures(bound: str, estimate: Estimate, tokens_per_byte: float, **settings) -> dict:
    """An estimate in the units people compare: perplexity, bits per token and per byte."""
    bits = estimate.nll / math.log(2)
    return {
        "bound": bound,
        "num_samples": None,
        "num_orders": None,
        **settings,
        "nll_per_token": estimate.nll,
        "standard_error": None if math.isnan(estimate.standard_error) else estimate.standard_error,
        "perplexity": estimate.perplexity,
        "bits_per_token": bits,
        "bits_per_byte": bits * tokens_per_byte,
        "num_tokens": estimate.num_tokens,
    }


def evaluate(config, workdir: pathlib.Path) -> dict:
    """All bounds that the config asks for, as a JSON-able dict.

    Raises:
      UserError: the data or their tokenizer are not the model's; a bound the family has not.
    """
    e = config.eval
    mesh = sharding.make_mesh(config.mesh)
    config_lib.validate_evaluation(config, sharding.num_row_shards(mesh))
    manifest = assemble.load_data(config, workdir)
    model = assemble.model_config(config, manifest.tokenizer, sharding.platform(mesh))
    memory_limit.check_evaluation(config, model, mesh)
    trained = assemble.load_trained(config, workdir, e.weights, mesh, cli.step_flag())
    assemble.check_same_tokenizer(manifest, trained.meta)
    split = manifest.split(e.split)
    windows = num_windows(manifest, e.split, e.max_windows)

    def batches():
        return assemble.eval_batches(config, manifest, e.split, e.max_windows, mesh)

    common = {"seed": config.seed, "total": math.ceil(windows / e.batch_size)}
    tokens_per_byte = split["tokens"] / split["bytes"]  # of the whole split, also for a part
    estimate = likelihood.make_nelbo(config, trained.built)(
        trained.params, batches(), num_samples=e.num_samples, progress="NELBO", **common
    )
    exact = objectives.is_exact(config)
    bounds = [
        _figures(
            "exact" if exact else "nelbo",
            estimate,
            tokens_per_byte,
            num_samples=1 if exact else e.num_samples,
        )
    ]
    if e.num_orders and not exact:
        importance_weighted = likelihood.make_importance_weighted(config, trained.built)
        estimate = importance_weighted(
            trained.params, batches(), num_orders=e.num_orders, progress="any-order", **common
        )
        bounds.append(
            _figures("importance_weighted", estimate, tokens_per_byte, num_orders=e.num_orders)
        )
    return {
        "split": e.split,
        "windows": windows,
        "num_tokens": estimate.num_tokens,
        "results": bounds,
        "unigram_perplexity": unigram_perplexity(manifest, e.split, e.max_windows),
        "objective": config.objective,
        "alpha_0": config.alpha_0,
        "trained_alpha_0": trained.meta["config"]["alpha_0"],
        "weights": e.weights,
        "step": trained.step,
        "seed": config.seed,
        "jax_settings": jax_settings.recorded(),
    }


def define_flags() -> None:
    flags.DEFINE_bool("verify", False, "Only check every file of the workdir: see verify.py.")


def default_config(flag: cli.FlagValue) -> str | None:
    """With --verify none that a damaged workdir could lack."""
    del flag
    asked = any(re.fullmatch("--?verify(=.*)?", arg) for arg in sys.argv)
    return verify.__file__ if asked else None


def main(config, workdir: pathlib.Path) -> None:
    if "verify" in flags.FLAGS and flags.FLAGS["verify"].value:
        verify.main(config, workdir)
        return
    path = workdir / "evaluate.json"
    results.check_can_write(path)
    figures = evaluate(config, workdir)
    if distributed.is_main():  # all processes have the same figures, and see the same folder
        results.write_json(path, figures)
    for result in figures["results"]:
        error = result["standard_error"]
        print(
            f"{result['bound']}: perplexity {result['perplexity']:.2f}, "
            f"{result['nll_per_token']:.4f} nats per token"
            + (f" ± {error:.4f}" if error else "")
            + f", {result['bits_per_byte']:.3f} bits per byte"
        )
    print(
        f"on {figures['num_tokens']:,} tokens of the {figures['split']} split; "
        f"a unigram model has perplexity {figures['unigram_perplexity']:.1f}"
    )
    print(f"wrote {path}")
    fits = cli.mesh_flags(config, sharding.make_mesh(config.mesh), sampling=True)
    print(cli.next_command("sample", workdir, *fits, keep=cli.PLACES))


CLI = {
    "reads_checkpoint": True,
    "define_flags": define_flags,
    "default_config": default_config,
}

if __name__ == "__main__":
    cli.run(main, **CLI)
