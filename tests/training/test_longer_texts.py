"""configs/owt_10k.py: training starts from a workdir of shorter texts."""

import json

import numpy as np
import pytest
from config_files import ROOT
from tiny_run import arguments, command, write_text

from configs import owt_10k
from esolm_jax.config import validate
from esolm_jax.data.manifest import load_manifest
from esolm_jax.training import checkpoint_meta

pytestmark = pytest.mark.fast_compile
WORKDIR = ROOT / "tests" / "fixtures" / "workdir_947f88e" / "run"  # of L = 16
LENGTH = 80


def test_training_goes_on_with_longer_texts(tmp_path):
    config = f"--config={ROOT}/configs/owt_10k.py:{WORKDIR}"
    fields = write_text(tmp_path / "text") | {"data.seq_len": LENGTH, "train.batch_size": 4}
    fields |= {"train.steps": 1, "train.eval_windows": 4, "train.log_every": 1}
    given = [config, f"--workdir={tmp_path}/run", *arguments(fields)]
    assert command("prepare", *given) == 0
    assert load_manifest(tmp_path / "run" / "data").seq_len == LENGTH
    assert command("train", *given) == 0
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses and np.isfinite(losses).all()
    assert losses[0] < 4.7  # 4.25; 5.17 from random weights
    saved = checkpoint_meta.saved_config(tmp_path / "run")
    assert (saved.data.seq_len, saved.train.steps, saved.init_from) == (LENGTH, 1, str(WORKDIR))


def test_what_belongs_to_the_shorter_run_is_not_taken_over(tmp_path, monkeypatch):
    earlier = checkpoint_meta.saved_config(WORKDIR)
    with earlier.unlocked():
        earlier.train.anneal_steps, earlier.sample.length, earlier.data.dir = 100, 16, "elsewhere"
    monkeypatch.setattr(checkpoint_meta, "saved_config", lambda *_: earlier)
    config = owt_10k.get_config(str(WORKDIR))
    validate(config)
    assert (config.train.anneal_steps, config.sample.length, config.data.dir) == (0, 0, "")
