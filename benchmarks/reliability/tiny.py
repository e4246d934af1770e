"""The test run of all sections: a model of one block on a few hundred short texts.

This file is a config file: --config=benchmarks/reliability/tiny.py.
"""

import hashlib
import json
import pathlib
import random

FILE = str(pathlib.Path(__file__).resolve())
STEPS = 40
_WORDS = "to be or not that is the question whether tis nobler in mind suffer slings".split()


def get_config():
    """One block of width 16; a checkpoint and a validation every 4 steps."""
    from esolm_jax import config as config_lib

    config = config_lib.default_config()
    config.data.source = "text"
    config.data.seq_len = 16
    config.data.tokenizer = "bytes"
    config.model.width = 16
    config.model.blocks = 1
    config.model.heads = 2
    config.model.cond_width = 0
    config.mesh.devices = 0
    config.optimizer.learning_rate = 1e-2
    config.optimizer.warmup_steps = 0
    config.train.batch_size = 16
    config.train.steps = STEPS
    config.train.log_every = 1
    config.train.eval_every = 4
    config.train.eval_windows = 16
    config.train.checkpoint_every = 4
    config.train.keep_last = 3
    config.train.keep_best = 0
    config.eval.batch_size = 8
    config.eval.max_windows = 16
    config.sample.num_texts = 2
    return config


def write_text(folder: pathlib.Path) -> list[str]:
    """Three files of short texts; the arguments that name them and where they are prepared."""
    folder.mkdir(parents=True)
    rng = random.Random(0)
    args = [f"--config={FILE}", f"--config.data.dir={folder / 'data'}"]
    for split, count in (("train", 300), ("validation", 30), ("test", 30)):
        path = folder / f"{split}.jsonl"
        texts = [" ".join(rng.choices(_WORDS, k=rng.randint(1, 8))) for _ in range(count)]
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        args.append(f"--config.data.{split}={path}")
    return args


def final_state(workdir: str) -> dict:
    """SHA-256 of the latest state's arrays, its step, and the logged values, in this process."""
    from esolm_jax import train
    from esolm_jax.training import checkpoint, checkpoint_meta, metrics

    run = train.Run(checkpoint_meta.saved_config(workdir), pathlib.Path(workdir))
    checkpoints = checkpoint.Checkpoints(pathlib.Path(workdir), keep_last=99, keep_best=0)
    state, meta = checkpoints.restore(run.training.abstract_state())
    checkpoints.close()
    entries = metrics.read(pathlib.Path(workdir))
    for entry in entries:
        entry.pop("timing", None)
    return {
        "step": int(state.step),
        "cursor": meta["cursor"],
        "sha256": _digest(state),
        "metrics": hashlib.sha256(json.dumps(entries).encode()).hexdigest(),
    }


def _digest(tree) -> str:
    import jax
    import numpy as np

    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
