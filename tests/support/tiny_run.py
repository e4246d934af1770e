"""A tiny run for tests: its config file, its text, and the verbs called in this process.

This file is a config file too: --config=tests/support/tiny_run.py.
"""

import importlib
import json
import pathlib
import random
import signal
import sys
import types

import jax
import numpy as np
import pytest
from absl import flags

from esolm_jax import cli
from esolm_jax import config as config_lib
from esolm_jax import train as train_lib
from esolm_jax.data import build
from esolm_jax.data.reader import TrainReader
from esolm_jax.family import registry
from esolm_jax.parallel import sharding
from esolm_jax.training import checkpoint, checkpoint_meta, train_state

LENGTH = 16
FLAGS = ("workdir", "topology", "num_slices", "program", "out", "sweep")  # of all verbs
FLAGS += ("from", "to", "tokenizer", "weights", "prompt", "prompts", "trace")
FLAGS += ("formats", "parts", "tolerance", "step", "verify", "suite", "data_root", "protocol")
FILE = str(pathlib.Path(__file__).resolve())
WORDS = "to be or not that is the question whether tis nobler in mind suffer slings".split()


def get_config():
    """One block of width 16, one device, bytes; its data have to be named."""
    config = config_lib.default_config()
    config.data.source = "text"
    config.data.seq_len = LENGTH
    config.data.tokenizer = "bytes"
    config.model.width = 16
    config.model.blocks = 1
    config.model.heads = 2
    config.model.cond_width = 0
    config.model.dropout = 0.0
    config.mesh.devices = 1
    config.optimizer.learning_rate = 1e-2
    config.optimizer.warmup_steps = 0
    config.train.batch_size = 16
    config.train.steps = 4
    config.train.log_every = 1
    config.train.eval_every = 2
    config.train.eval_windows = 8
    config.train.checkpoint_every = 2
    config.eval.batch_size = 8
    config.eval.max_windows = 16
    config.sample.num_texts = 2
    return config


def write_text(folder: pathlib.Path) -> dict[str, str]:
    """Three small files of documents of 3 to 60 bytes; the fields of config.data that name them."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    fields = {}
    for split, count in (("train", 80), ("validation", 10), ("test", 10)):
        texts = [" ".join(rng.choices(WORDS, k=rng.randint(1, 8))) for _ in range(count)]
        path = folder / f"{split}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        fields[f"data.{split}"] = str(path)
    return fields


def write_data(folder: pathlib.Path, **fields) -> dict[str, str]:
    """Writes the text and prepares it; the fields of config.data that name both."""
    made = write_text(folder / "text") | {"data.dir": str(folder / "data")}
    build.prepare(make_config(made | fields), made["data.dir"], progress=False)
    return made | fields


def _fixed_alpha_0(fields: dict, default=None):
    """α₀ of the family that the fields name, if it fixes it."""
    fixed = registry.get(fields.get("objective", "eso_b")).fixed_alpha_0
    return default if fixed is None else fixed


def make_config(fields: dict):
    """The tiny config with these dotted fields changed; alpha_0 follows the objective."""
    config = get_config()
    config.alpha_0 = _fixed_alpha_0(fields, config.alpha_0)
    config.update_from_flattened_dict(fields)
    config_lib.validate(config)
    return config


def arguments(fields: dict) -> list[str]:
    """The fields as overrides on the command line."""
    fixed = _fixed_alpha_0(fields)
    fields = ({} if fixed is None else {"alpha_0": fixed}) | fields
    return [f"--config.{name}={value}" for name, value in fields.items()]


def command(verb: str, *args: str) -> int:
    """`python -m esolm_jax.VERB ARGS` in this process; returns the exit code."""
    module = importlib.import_module(f"esolm_jax.{verb}")
    argv, handlers = sys.argv, {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    sys.argv = [f"{verb}.py", *map(str, args)]
    _forget_flags()  # those of benchmarks that a test imports
    try:
        cli.run(module.main, module.CLI)
    except SystemExit as end:
        return end.code or 0
    finally:
        sys.argv = argv
        for number, handler in handlers.items():
            signal.signal(number, handler)
        _forget_flags()
    raise AssertionError("app.run returned")


def _forget_flags() -> None:
    """Removes the flags of all verbs, so that a verb can define them again."""
    flags.FLAGS.unparse_flags()
    for name in list(flags.FLAGS):
        if name in FLAGS or name.split(".")[0] == "config":
            delattr(flags.FLAGS, name)


def train(config, workdir: pathlib.Path) -> None:
    """train.main, with the signal handlers put back."""
    handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        train_lib.main(config, workdir)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def steps(config, count: int, state=None):
    """`count` training steps without files: (states after each, metrics of each)."""
    run = train_lib.Run(config, pathlib.Path("unused"))
    step_fn = run.training.step_fn()
    state = fresh_state(run) if state is None else state
    reader = TrainReader(run.manifest, batch_size=config.train.batch_size, seed=config.seed)
    states, metrics = [], []
    for _ in range(count):
        state, values = step_fn(state, put(next(reader), run))
        states.append(to_host(state))
        metrics.append({name: float(value) for name, value in values.items()})
    reader.close()
    return states, metrics


def put(batch, run):
    """A batch on the run's mesh."""
    return sharding.put_batch(batch, run.built.mesh, len(batch["x"]))


def to_host(tree):
    """Copies of all arrays, as numpy."""
    return jax.tree.map(np.array, tree)


def fresh_state(run) -> train_state.TrainState:
    """The state that a run begins with."""
    return run.restore_or_init(types.SimpleNamespace(has_steps=lambda: False))[0]


def last_checkpoint(config, workdir: pathlib.Path):
    """The state (numpy) and meta of the latest checkpoint in a workdir."""
    run = train_lib.Run(config, workdir)
    checkpoints = checkpoint.Checkpoints(workdir, keep_last=99, keep_best=99)
    state, _ = run.restore_or_init(checkpoints)
    checkpoints.close()
    return to_host(state), checkpoint_meta.read_meta(workdir)


def refused_by(verb: str):
    """A fixture refused(args, *parts): the verb ends with one line that has these parts, and
    nothing is written."""

    @pytest.fixture
    def refused(capsys, tmp_path):
        def check(args, *parts):
            before = sorted(tmp_path.rglob("*"))
            capsys.readouterr()
            assert command(verb, *map(str, args)) == 2
            printed = capsys.readouterr()
            assert printed.out == ""
            (line,) = printed.err.splitlines()
            for part in parts:
                assert part in line
            assert sorted(tmp_path.rglob("*")) == before

        return check

    return refused
