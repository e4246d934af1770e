"""Published weights → a workdir for evaluate, sample and train."""

import dataclasses
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import esolm_jax
from esolm_jax import config as config_lib
from esolm_jax import results
from esolm_jax.data import tokenizer as tokenizer_lib
from esolm_jax.data.manifest import tokenizer_entry
from esolm_jax.data.render import num_ids
from esolm_jax.errors import UserError
from esolm_jax.files import workdir_lock
from esolm_jax.interop.published import config as published_config
from esolm_jax.interop.published import file as published_file
from esolm_jax.interop.published import names as published_names
from esolm_jax.model import build
from esolm_jax.process import prng
from esolm_jax.training import checkpoint, checkpoint_steps, optimizer, restore, train_state

WEIGHTS = ("both", "ema", "raw")


@dataclasses.dataclass(frozen=True)
class Converted:
    """The step, the number of parameters, and a description of the weights that were written."""

    step: int
    parameters: int
    weights: str


def convert(config, source: str, workdir: pathlib.Path, tokenizer: str, weights: str) -> Converted:
    """Writes the checkpoint, tokenizer and config of a file in `workdir`: all of it or nothing.

    The optimizer state is new: moments are zero and the learning rate warms up again. The step is
    the file's, so that the EMA keeps its decay.

    Args:
      config: the run's config; model sizes must be those of the file.
      source: the file.
      tokenizer: a file or folder, or "" for config.data.tokenizer_path.
      weights: the source of `params` and `ema`: both sets of the file, or one for both.

    Raises:
      UserError: file, config and tokenizer do not match, or the workdir is not empty.
    """
    check_empty(workdir)
    published_names.check_config(config.model)
    published = published_file.read(source)
    published_config.check(config, published)
    chosen = _tokenizer(config, tokenizer)
    _check_vocabulary(published, chosen)
    _check_sizes(config, published)
    with config.unlocked():
        config.data.tokenizer, config.data.tokenizer_ids = chosen.kind, 0
        config.data.tokenizer_path = saved_tokenizer(chosen, workdir)
    model = build.model_config(config, tokenizer_entry(chosen), "cpu")
    raw, ema, words = _sets(published, model, weights)
    state = train_state.init_state(raw, optimizer.make(config), prng.key(config.seed))
    step = published.step or 0
    state = dataclasses.replace(state, ema=ema, step=jnp.asarray(step, jnp.int32))
    meta = converted_meta(config, chosen, {"file": published.path.name, "weights": words})
    write_workdir(workdir, meta, chosen, lambda checkpoints, _: checkpoints.save(state, meta))
    return Converted(step, sum(a.size for a in jax.tree.leaves(raw)), words)


def converted_meta(config, tokenizer, source: dict) -> dict:
    """The meta of a converted checkpoint; `source`: JSON-able, names its origin."""
    return {
        "config": config_lib.to_saved(config),
        "cursor": 0,
        "tokenizer": tokenizer_entry(tokenizer),
        "version": esolm_jax.__version__,
        "prng": prng.IMPL,
        "converted": source,
    }


def check_empty(workdir: pathlib.Path) -> None:
    """UserError unless the workdir is empty or holds only prepared data."""
    there = [path.name for path in workdir.iterdir()] if workdir.exists() else []
    if others := sorted(n for n in there if n != "data" and not workdir_lock.is_file_of_lock(n)):
        raise UserError(
            f"--workdir={workdir}: must be new, empty or hold only data/, but holds "
            f"{', '.join(others[:5])}"
        )


def _tokenizer(config, given: str) -> tokenizer_lib.Tokenizer:
    path = given or config.data.tokenizer_path
    if not path and config.data.tokenizer == tokenizer_lib.Bytes.kind:
        path = config.data.tokenizer
    if not path:
        raise UserError(
            "--tokenizer is missing: a file or folder with the tokenizer of the run: tokenizer.json"
            ", vocab.json and merges.txt, vocab.txt, or a SentencePiece .model"
        )
    return tokenizer_lib.read_tokenizer(path)


def _check_vocabulary(published: published_file.Published, tokenizer) -> None:
    table = published.raw.get("vocab_embed.embedding")
    ids = num_ids(tokenizer)
    if table is not None and len(table.shape) == 2 and table.shape[0] != ids:
        raise UserError(
            f"{published.path}: has {table.shape[0]} ids, but the {tokenizer.kind} tokenizer has "
            f"{ids} with the mask (id {tokenizer.mask_id}): not the tokenizer of this run"
        )
    ours = (published.ours or {}).get("tokenizer")
    if ours and ours["fingerprint"] != tokenizer.fingerprint:
        raise UserError(
            f"{published.path}: needs the tokenizer that it was trained on "
            f"({restore.describe_tokenizer(ours)}), not "
            f"{restore.describe_tokenizer(tokenizer_entry(tokenizer))}"
        )


def _check_sizes(config, published: published_file.Published) -> None:
    """Checks config.model against the shapes before allocation; other differences are
    found later."""
    table = published.raw.get("vocab_embed.embedding")
    if table is None:
        raise UserError(f"{published.path}: missing tensors: vocab_embed.embedding")
    if len(table.shape) != 2:
        raise UserError(
            f"{published.path}: vocab_embed.embedding: must have shape (V, D), not {table.shape}"
        )
    sizes = published_names.model_config(published.raw, config.model.heads)
    for name in ("width", "blocks", "cond_width"):
        if config.model[name] != getattr(sizes, name):
            raise UserError(
                f"config.model.{name}={config.model[name]}: must be {getattr(sizes, name)}, as in "
                f"the tensors of {published.path}"
            )


def _sets(published: published_file.Published, model, weights: str) -> tuple[dict, dict, str]:
    """params, ema, and a description of their source in the file."""
    where = str(published.path)
    if weights == "ema" and published.shadow is None:
        raise UserError(f"--weights=ema: must be left out, because {where} has one set of weights")
    if published.shadow is None:
        raw = published_names.to_params(published.raw, model, where)
        which = (published.ours or {}).get("weights")
        return raw, raw, f"its one set of weights{f' ({which})' if which else ''}"
    if weights == "raw":
        raw = published_names.to_params(published.raw, model, where)
        return raw, raw, "the raw weights, not the EMA"
    ema = published_names.to_params(published.ema(), model, f"{where}, EMA")
    if weights == "ema":
        return ema, ema, "the EMA, not the raw weights"
    raw = published_names.to_params(published.raw, model, where)
    same = jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), raw, ema))
    return raw, ema, "raw weights and EMA" + (" (identical)" if same else "")


def saved_tokenizer(tokenizer, workdir: pathlib.Path) -> str:
    """config.data.tokenizer_path of the copy in the workdir."""
    if tokenizer.kind == "bytes":
        return ""
    folder = workdir.resolve() / "tokenizer"
    is_file = tokenizer.kind == "sentencepiece"
    return str(folder / tokenizer_lib.MODEL_FILE if is_file else folder)


def write_workdir(
    workdir: pathlib.Path,
    meta: dict,
    tokenizer,
    save: Callable[[checkpoint.Checkpoints, pathlib.Path], None],
) -> None:
    """Writes config, tokenizer and checkpoint to a folder next to the workdir, then moves them, so
    that a killed process leaves no incomplete workdir.

    Args:
      save: writes the checkpoint, given the checkpoints and a folder for temporary files.
    """
    hold = workdir_lock.hold(workdir, name=f"--workdir={workdir}")
    workdir = workdir.resolve()
    with hold, results.draft_beside(workdir) as draft:
        check_empty(workdir)  # again: another process may have written to it
        (draft / "tokenizer").mkdir()
        tokenizer.save(draft / "tokenizer")
        results.write_json(draft / "config.json", meta["config"])
        checkpoints = checkpoint.Checkpoints(draft, keep_last=1, keep_best=0)
        save(checkpoints, draft)
        checkpoints.close()
        workdir.mkdir(parents=True, exist_ok=True)
        for name in ("tokenizer", "config.json", checkpoint_steps.FOLDER):
            (draft / name).rename(workdir / name)
