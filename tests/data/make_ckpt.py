"""Makes the .ckpt and .pt files beside it, with PyTorch and OmegaConf, which the tests lack.

    pip install torch omegaconf && python tests/data/make_ckpt.py

esolm.ckpt is a Lightning checkpoint as the published code saves it: state_dict, EMA, loops,
optimizer, and hyper-parameters as OmegaConf containers beside an object of another library.
tensors.pt holds tensors of many dtypes and strides.
"""

import collections
import pathlib
import sys
import types

import numpy as np
import torch
from omegaconf import OmegaConf

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import published_toy  # noqa: E402


def tokenizer_of_another_library():
    """An instance of a class that whoever reads the file does not have."""
    module = types.ModuleType("transformers")
    module.GPT2TokenizerFast = type("GPT2TokenizerFast", (), {"__module__": "transformers"})
    sys.modules["transformers"] = module
    tokenizer = module.GPT2TokenizerFast()
    tokenizer.name = "gpt2"
    return tokenizer


def lightning() -> dict:
    raw = {k: torch.from_numpy(v) for k, v in published_toy.weights(0).items()}
    ema = [torch.from_numpy(v) for v in published_toy.weights(1).values()]
    state = collections.OrderedDict((f"backbone.{name}", array) for name, array in raw.items())
    state["backbone.rotary_emb.inv_freq"] = torch.ones(2)
    state.move_to_end("backbone.output_layer.linear.bias")  # any order, but the EMA's is the same
    order = [name.removeprefix("backbone.") for name in state]
    ema = dict(zip(raw, ema, strict=True))
    state._metadata = collections.OrderedDict(version=1)
    return {
        "epoch": 0,
        "global_step": published_toy.STEP,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": state,
        "loops": {"fit_loop": {"epoch_progress": {"current": {"completed": 0}}}},
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(3.5)}},
        "optimizer_states": [{"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{}]}],
        "lr_schedulers": [{"last_epoch": 250}],
        "hparams_name": "kwargs",
        "hyper_parameters": {
            "config": OmegaConf.create(published_toy.HYPER),
            "tokenizer": tokenizer_of_another_library(),
        },
        "ema": {
            "decay": 0.999,
            "num_updates": published_toy.STEP,
            "shadow_params": [ema[name] for name in order if name in ema],
        },
        "sampler": {"random_state": None},
    }


def tensors() -> dict:
    grid = np.arange(12).reshape(3, 4)
    names = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int8", "uint8")
    found = {name: torch.from_numpy(grid).to(getattr(torch, name)) for name in names}
    found["bool"] = torch.from_numpy(grid % 2 == 0)
    found["transposed"] = torch.from_numpy(grid).T
    found["part"] = torch.from_numpy(grid)[1:, ::2]
    found["scalar"] = torch.tensor(2.5)
    found["parameter"] = torch.nn.Parameter(torch.ones(2))
    return found


if __name__ == "__main__":
    torch.save(lightning(), HERE / "esolm.ckpt")
    torch.save(tensors(), HERE / "tensors.pt")
