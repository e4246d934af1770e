"""python -m esolm_jax.sample --workdir=DIR: texts from the checkpoint in DIR."""

import json
import pathlib
import time

import jax
import numpy as np

from esolm_jax import assemble, cli, results, sharding
from esolm_jax.data.tokenizer import load_tokenizer
from esolm_jax.errors import UserError
from esolm_jax.sampling import decode, passes, schedule
from esolm_jax.sampling.choose import Choice


def make_schedule(config, length: int) -> schedule.Schedule:
    """The orders and step sizes that config.sample asks for, drawn from config.sample.seed.

    Raises:
      UserError: the family cannot be sampled by that schedule.
    """
    s, rng = config.sample, np.random.default_rng(config.sample.seed)
    one_at_a_time = s.schedule in ("ancestral", "left_to_right") and s.steps == 0
    if config.objective == "ar" and not one_at_a_time:
        raise UserError(
            f"config.sample.schedule={s.schedule!r}, sample.steps={s.steps}: objective ar "
            "generates left to right, one token per step; leave both at their defaults"
        )
    if s.schedule == "left_to_right" and s.steps:
        raise UserError(
            f"config.sample.steps={s.steps}: must be 0 with sample.schedule left_to_right, which "
            "generates one token per step"
        )
    if config.objective == "ar" or s.schedule == "left_to_right":
        return schedule.left_to_right(s.num, length)
    if config.objective == "bd3":
        if s.schedule != "ancestral":
            raise UserError(
                f"config.sample.schedule={s.schedule!r}: must be ancestral or left_to_right with "
                "objective bd3, which generates block by block"
            )
        return schedule.blockwise(rng, s.num, length, config.block_length, s.steps)
    if s.schedule == "ancestral":
        return schedule.ancestral(rng, s.num, length, config.alpha_0, s.steps)
    shuffle = s.schedule == "shuffled_strided"
    return schedule.strided(rng, s.num, length, config.alpha_0, s.steps, shuffle=shuffle)


def _shown(ids: list[int], config, tokenizer) -> list[int]:
    """The tokens of a text; with one document a window, what follows EOS was never trained."""
    if config.data.packing == "pad" and tokenizer.eos_id in ids:
        return ids[: ids.index(tokenizer.eos_id)]
    return ids


def _check_mesh(config, mesh) -> None:
    if jax.process_count() > 1:
        raise UserError(f"sampling is for one process, but there are {jax.process_count()}")
    shards = sharding.num_row_shards(mesh)
    if config.sample.num % shards:
        raise UserError(
            f"config.sample.num={config.sample.num}: must be a multiple of the {shards} devices "
            "(mesh.data x mesh.fsdp) that rows are split over"
        )
    if mesh.shape["sequence"] > 1:
        raise UserError(
            f"config.mesh.sequence={mesh.shape['sequence']}: must be 1 for sampling; put those "
            "devices on another axis"
        )


def sample(config, workdir: pathlib.Path) -> dict:
    """Samples config.sample.num texts; returns them with how they were made, JSON-able."""
    s = config.sample
    mesh = sharding.make_mesh(config.mesh)
    _check_mesh(config, mesh)
    trained = assemble.load_trained(config, workdir, s.weights, mesh)
    tokenizer = load_tokenizer(workdir / "tokenizer")
    if tokenizer.fingerprint != trained.meta["tokenizer"]["fingerprint"]:
        raise UserError(
            f"{workdir}/tokenizer: not the tokenizer that the checkpoint was trained on"
        )
    drawn = make_schedule(config, config.data.seq_len)
    plan = passes.plan(
        config, drawn, mask_id=trained.built.special.mask, start_token=trained.built.special.start
    )
    choice = Choice(
        mask_id=trained.built.special.mask, temperature=s.temperature, top_p=s.top_p, top_k=s.top_k
    )
    key = jax.random.key(s.seed)
    model = trained.built.model

    def run(**kwargs):
        begin = time.perf_counter()
        text = decode.decode(model, trained.params, plan, choice, key, mesh=mesh, **kwargs)
        return np.asarray(text), time.perf_counter() - begin

    print(f"compiling, then {len(drawn.step_sizes)} passes for {s.num} texts …", flush=True)
    _, compile_seconds = run(dry_run=True)
    token_ids, seconds = run()
    return {
        "texts": [tokenizer.decode(_shown(row.tolist(), config, tokenizer)) for row in token_ids],
        "token_ids": token_ids.tolist(),
        "order": drawn.order.tolist(),
        "step_sizes": drawn.step_sizes.tolist(),
        "num_diffusion": drawn.num_diffusion,
        "nfe": len(drawn.step_sizes),
        "compile_seconds": compile_seconds,
        "seconds": seconds,
        "tokens_per_second": token_ids.size / seconds,
        "objective": config.objective,
        "alpha_0": config.alpha_0,
        "schedule": s.schedule,
        "temperature": s.temperature,
        "top_p": s.top_p,
        "top_k": s.top_k,
        "seed": s.seed,
        "weights": s.weights,
        "step": trained.step,
    }


def main(config, workdir: pathlib.Path) -> None:
    figures = sample(config, workdir)
    path = workdir / "samples.json"
    results.write_text(path, json.dumps(figures) + "\n")
    for i, text in enumerate(figures["texts"]):
        print(f"--- sample {i} " + "-" * 60)
        print(text)
    print("-" * 71)
    print(
        f"{len(figures['texts'])} texts of {config.data.seq_len} tokens in "
        f"{figures['seconds']:.2f} s (and {figures['compile_seconds']:.1f} s to compile): "
        f"{figures['tokens_per_second']:,.0f} tokens/s, NFE {figures['nfe']}, "
        f"{figures['num_diffusion']} tokens of each text by diffusion"
    )
    print(f"wrote {path}")
    another = f"--config.sample.seed={config.sample.seed + 1}"
    print(cli.next_command("sample", workdir, another))


CLI = {"reads_checkpoint": True}

if __name__ == "__main__":
    cli.run(main, **CLI)
