"""python -m esolm_jax.sample --workdir=DIR: texts from the checkpoint in DIR.

--prompt='once upon [MASK:3] time'   a prompt; may be given several times
--prompts=FILE                       prompts of a text file or JSONL: see sampling/prompts.py
--trace                              also a picture and a page that plays the steps
--judge=FOLDER                       also the quality of the texts: see judge.py
"""

import dataclasses
import pathlib
import time

import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh

from esolm_jax import cli, memory_limit, results
from esolm_jax.data.manifest import open_tokenizer, tokenizer_entry
from esolm_jax.model import build
from esolm_jax.parallel import distributed, multihost, sharding
from esolm_jax.process import jax_settings
from esolm_jax.process.background import Background
from esolm_jax.sampling import texts as texts_lib
from esolm_jax.sampling import trace
from esolm_jax.sampling.engine import host_weights
from esolm_jax.sampling.engine import network as network_lib
from esolm_jax.sampling.generate import Generator, check, draft_figures
from esolm_jax.sampling.loops.loop import Ends
from esolm_jax.sampling.plan import prompts as prompts_lib
from esolm_jax.sampling.plan.passes import NEVER
from esolm_jax.training import restore


def define_flags() -> None:
    flags.DEFINE_multi_string("prompt", [], "A text to continue, or with [MASK] spans to fill in.")
    flags.DEFINE_string("prompts", None, "A text file, or .jsonl with prompts.")
    flags.DEFINE_bool("trace", False, "Also write a picture and a page that plays the steps.")
    flags.DEFINE_string("judge", None, "Also judge the texts: a folder, as for the verb judge.")


def _prompts(given: list[str], file: str | None, tokenizer, length: int):
    """The prompts of the command line, then of the file. UserError: see prompts_lib."""
    common = {"tokenizer": tokenizer, "length": length}
    in_one_line = (ascii(text[:40])[1:-1] for text in given)
    named = zip(given, in_one_line, strict=True)
    found = (
        prompts_lib.parse_text(text, name=f"--prompt={name}", **common) for text, name in named
    )
    from_file = [] if file is None else prompts_lib.parse_file(pathlib.Path(file), **common)
    return prompts_lib.bounded([*prompts_lib.bounded(found), *from_file])


def sample(
    config,
    workdir: pathlib.Path,
    *,
    prompt: list[str] = (),
    prompts: str | None = None,
    with_trace: bool = False,
) -> tuple[dict, trace.Trace | None]:
    """Samples config.sample.num_texts texts, of each prompt if there are any.

    Returns (texts and their settings, JSON-able; with `with_trace` a Trace, else None).
    """
    begin = time.perf_counter()
    check(config)
    mesh = sharding.make_mesh(config.mesh)
    tokenizer = open_tokenizer(workdir / "tokenizer")
    found = _prompts(prompt, prompts, tokenizer, texts_lib.length_of(config))
    memory_limit.check_sampling_fits(config, tokenizer, found, mesh)
    built = build.build_model(config, tokenizer_entry(tokenizer), mesh)
    canvas = texts_lib.make_canvas(config, found, built.special, built.model.vocab_size)
    multihost.check_same_value("prompts", [canvas.token.tolist(), canvas.known.tolist()])
    ends = Ends(tokenizer.eos_id, tokenizer.eot_id)
    generator = Generator.of(config, canvas, built.special, mesh=mesh, ends=ends)
    on = host_weights.parameter_mesh(config.sample.weight_dtype, mesh)
    # JAX's search for leaked tracers takes those of another thread for leaks.
    programs = Background(
        lambda: _programs(config, built, generator, on),
        in_thread=not jax.config.jax_check_tracer_leaks,
    )
    trained = restore.load_trained(config, workdir, config.sample.weights, on, cli.step_flag())
    restore.check_tokenizer(tokenizer, workdir, trained.meta)
    loaded = time.perf_counter()
    total = int(generator.schedule.sizes.sum())
    print(f"compiling, then {total:,} tokens for {len(canvas.token)} texts …", flush=True)
    fold, run = programs.result()
    multihost.gather("")  # a barrier: all processes have compiled
    network = host_weights.to_devices(fold(trained.params), mesh)
    trained = dataclasses.replace(trained, params={})  # frees the memory
    compiled = time.perf_counter()
    decoded = multihost.to_host(run(network))
    end = time.perf_counter()
    nfe, generated = generator.nfe(decoded), texts_lib.num_generated(decoded)
    figures = {
        "samples": texts_lib.sample_rows(
            config, generator, decoded, tokenizer, prompted=bool(found)
        ),
        "num_diffusion": generator.is_diffusion().sum(axis=1).tolist(),
        "num_generated": generated,
        "nfe": nfe,
        **_seconds(begin, loaded, compiled, end),
        "tokens_per_second": generated / (end - compiled),
        "speculation": draft_figures(decoded),
        **_settings(config, trained.step),
    }
    steps = _trace(config, generator, decoded, tokenizer, nfe) if with_trace else None
    return figures, steps


def _programs(config, built: build.BuiltModel, generator: Generator, on: Mesh):
    """(fold: parameters → network, both on the mesh `on`; run: network → texts), compiled. Needs
    no weights."""
    params = build.abstract_params(built.model, on)
    dtype = config.sample.weight_dtype
    fold = network_lib.compiled_fold(built.model, params, on, runs_on=built.mesh, dtype=dtype)
    network = host_weights.abstract(fold.out_info, built.mesh)
    return fold, generator.compile(network)


def _settings(config, step: int) -> dict:
    return {
        "objective": config.objective,
        "alpha_0": config.alpha_0,
        "sample": config.sample.to_dict(),
        "step": step,
        "jax_settings": jax_settings.recorded(),
    }


def _seconds(begin: float, loaded: float, compiled: float, end: float) -> dict[str, float]:
    return {
        "load_seconds": loaded - begin,
        "compile_seconds": compiled - loaded,
        "seconds": end - compiled,
        "first_sample_seconds": end - begin,
    }


def _trace(config, generator: Generator, decoded, tokenizer, nfe: int) -> trace.Trace:
    revealed = decoded.revealed_at.astype(np.int64)
    numbered = np.where(revealed == -1, trace.GIVEN, revealed - generator.plan.prompt_passes)
    title = f"{config.objective}, α₀ = {config.alpha_0:g}, {revealed.shape[1]} tokens, NFE {nfe}"
    return trace.Trace(
        pieces=[
            tokenizer.pieces(row.tolist(), bos_is_given=bool(known[0]))
            for row, known in zip(decoded.text, generator.canvas.known, strict=True)
        ],
        revealed_at=np.where(
            (revealed == NEVER) | ~texts_lib.before_eos(decoded), trace.NEVER, numbered
        ),
        is_diffusion=generator.is_diffusion(),
        title=title,
    )


def main(config, workdir: pathlib.Path) -> None:
    texts, summary = workdir / "samples.jsonl", workdir / "samples.json"
    page, picture = workdir / "trace.html", workdir / "trace.png"
    judge, judged = cli.flag("judge", None), workdir / "samples.judge.json"
    results.check_can_write(texts, summary, page, picture, judged)
    if judge:  # imported on use, because it takes time
        from esolm_jax.evaluation.quality import of_samples

        of_samples.check(judge)
    figures, steps = sample(
        config,
        workdir,
        prompt=cli.flag("prompt", []),
        prompts=cli.flag("prompts", None),
        with_trace=cli.flag("trace", False),
    )
    rows = figures.pop("samples")
    lines = "".join(results.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if distributed.is_main():  # all processes have the same texts
        results.write_text(texts, lines)
        results.write_json(summary, figures)
    for i, row in enumerate(rows):
        print(f"--- sample {i} " + "-" * 60)
        print(row["text"])
    print("-" * 71)
    print(
        f"{len(rows)} texts, {figures['num_generated']:,} tokens in {figures['seconds']:.2f} s "
        f"(and {figures['load_seconds']:.1f} s to load, {figures['compile_seconds']:.1f} s to "
        f"compile): {figures['tokens_per_second']:,.0f} tokens/s, NFE {figures['nfe']}"
    )
    written = [texts, summary]
    if steps is not None:
        if distributed.is_main():
            trace.write_html(steps, page)
            trace.write_png(steps, picture)
        written += [page, picture]
    if judge:
        of_samples.judge(config, judge, rows, judged)
        written.append(judged)
    for path in written:
        print(f"wrote {path}")
    another = f"--config.sample.seed={(config.sample.seed + 1) % 2**32}"
    print(cli.next_command("sample", workdir, another, keep=".*"))


CLI = cli.Verb(reads_checkpoint=True, leaves_at_once=True, define_flags=define_flags)

if __name__ == "__main__":
    cli.run(main, CLI)
