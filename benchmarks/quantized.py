"""python -m benchmarks.quantized --workdir=DIR: the perplexity of 8-bit weights and caches.

The decoding loop of `sample` runs on held-out texts: each token that it would draw is replaced by
the text's, and −log p of that token is taken from the logits of its pass, which reads the quantized
weights and the quantized cache. One random order for each text, the same for all settings, so that
the differences are paired. For an Eso-LM that is a likelihood of one order (an upper bound of the
NLL in expectation), for AR the NLL. Writes docs/quantized.{json,md}.
"""

import argparse
import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import report_writer
from esolm_jax.data.manifest import load_manifest
from esolm_jax.data.reader import eval_batches
from esolm_jax.model.lm_head import token_nll
from esolm_jax.parallel import sharding
from esolm_jax.sampling.engine.network import fold
from esolm_jax.sampling.generate import Generator
from esolm_jax.sampling.loops.plain import Plain
from esolm_jax.sampling.plan.canvas import Canvas, Seed
from esolm_jax.training import checkpoint_meta, restore

SETTINGS = {  # name → (config.sample.weight_dtype, config.sample.cache_dtype)
    "model.dtype": ("auto", "auto"),
    "weights int8": ("int8", "auto"),
    "cache int8": ("auto", "int8"),
    "cache float8": ("auto", "float8_e4m3fn"),
    "weights and cache int8": ("int8", "int8"),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Forced:
    """A sampler that draws the tokens of these texts: int32 [B, L]."""

    text_BL: np.ndarray

    def __call__(self, logits_BPV, position_BP, noise):
        del logits_BPV, noise
        return jnp.take_along_axis(jnp.asarray(self.text_BL), position_BP, axis=1, mode="clip")


def held_out(workdir: pathlib.Path, split: str, count: int) -> np.ndarray:
    """Full windows of a split, evenly spaced: int32 [texts, L]."""
    manifest = load_manifest(workdir / "data")
    (batch,) = eval_batches(manifest, split, batch_size=count, max_windows=count)
    return batch["x"][batch["valid"].all(axis=1)]


def nll(config, trained, text_BL: np.ndarray) -> np.ndarray:
    """−log p of each text by the decoding loop, in nats: [texts]."""
    built = trained.built
    seeds = tuple(Seed(0, row) for row in range(len(text_BL)))
    canvas = dataclasses.replace(Canvas.empty(*text_BL.shape), seeds=seeds)
    generator = Generator.of(config, canvas, built.special, mesh=built.mesh)
    task = dataclasses.replace(generator.loop.task, sampler=Forced(text_BL))
    network = fold(built.model, trained.params, built.mesh, dtype=config.sample.weight_dtype)
    decoded = Plain(task, with_logits=True).run(network)
    np.testing.assert_array_equal(decoded.text, text_BL)
    by_rank = np.take_along_axis(text_BL, generator.schedule.order, axis=1)
    each = jax.jit(token_nll, static_argnums=2)(decoded.logits, by_rank, built.special.mask)
    return np.asarray(each, np.float64).sum(axis=1)


def measure(workdir: pathlib.Path, split: str, count: int) -> dict:
    config = checkpoint_meta.saved_config(workdir)
    mesh = sharding.make_mesh(config.mesh)
    trained = restore.load_trained(config, workdir, "ema", mesh)
    text, rows, exact = held_out(workdir, split, count), {}, None
    for name, (weights, cache) in SETTINGS.items():
        with config.unlocked():
            config.sample.update({"steps": 0, "weight_dtype": weights, "cache_dtype": cache})
        found = nll(config, trained, text) / text.shape[1]
        exact = found if exact is None else exact
        change = found - exact
        rows[name] = {
            "perplexity": float(np.exp(found.mean())),
            "change_percent": float(100 * np.expm1(change.mean())),
            "standard_error_percent": float(100 * change.std(ddof=1) / len(text) ** 0.5),
        }
        print(name, rows[name], flush=True)
    return {
        "objective": config.objective,
        "alpha_0": config.alpha_0,
        "step": trained.step,
        "model": f"{config.model.width} x {config.model.blocks}, {trained.built.model.dtype}",
        "texts": len(text),
        "length": int(text.shape[1]),
        "split": split,
        "settings": rows,
    }


def page(found: dict) -> str:
    rows = [
        [name, f"{f['perplexity']:.3f}"]
        + [f"{f['change_percent']:+.3f} ± {f['standard_error_percent']:.3f}"]
        for name, f in found["settings"].items()
    ]
    return f"""# Perplexity of quantized sampling

Made by `python -m benchmarks.quantized --workdir=DIR`. {found["objective"]}, α₀ = {found["alpha_0"]:g}, model
{found["model"]}, step {found["step"]:,}; {found["texts"]} texts of {found["length"]} tokens of the {found["split"]} split.
The decoding loop of `sample` runs on these texts, one token per pass, with their tokens in place of drawn ones; every
pass reads the quantized weights and cache. One generation order for each text, the same in all rows. The change is
relative to the first row, with the standard error over texts of the paired difference.

{report_writer.table(["setting", "perplexity", "change, %"], rows)}"""  # noqa: E501


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--split", default="validation")
    parser.add_argument("--texts", type=int, default=128)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("docs/quantized"))
    args = parser.parse_args()
    found = measure(args.workdir, args.split, args.texts)
    report_writer.write(args.out, found, page(found))


if __name__ == "__main__":
    main()
