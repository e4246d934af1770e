"""Training steps of the published PyTorch code, on request: train_speed.py's other process.

    python published_step.py DIR

DIR is a checkout of the published implementation; this Python needs torch and einops. The first
line of stdin is JSON, the shapes and the objectives; every further line requests a burst of steps
and is answered by a line of JSON on stdout with the seconds that it took. The process idles
otherwise.

The step is that of the published trainer: loss, optimizer, Lightning's gradient clip and EMA. Stubs
replace packages that a step does not need (data, logging, the trainer itself). FlexAttention has no
backward pass on CPUs, so PyTorch's fused attention replaces it, with the published masks.
"""

import importlib.abc
import importlib.machinery
import json
import sys
import time
import types
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention.flex_attention import create_mask

# Packages and modules of DIR that a step imports and never calls.
UNUSED = (
    "dataloader",
    "datasets",
    "fsspec",
    "huggingface_hub",
    "hydra",
    "lightning",
    "metrics",
    "omegaconf",
    "scipy",
    "timm",
    "transformers",
)

# Fields of the published configs, by objective; those of its training scripts.
ALGO = {
    "ar": {"parameterization": "ar", "backbone": "dit", "causal_attention": True},
    "mdlm": {"parameterization": "subs", "backbone": "dit", "causal_attention": False},
    "eso_a": {
        "parameterization": "subs",
        "backbone": "esolm_dit",
        "causal_attention": False,
        "diffusion_shuffle": True,
        "diffusion_attn_mode": "mixed2",
        "sequential_shuffle": False,
        "sequential_attn_mode": "mixed",
    },
    "eso_b": {
        "parameterization": "subs",
        "backbone": "esolm_dit",
        "causal_attention": False,
        "diffusion_shuffle": True,
        "diffusion_attn_mode": "causal",
        "sequential_shuffle": True,
        "sequential_attn_mode": "causal",
    },
}


class Stub:
    """Any attribute of a stub module: a base class or a name in an annotation."""

    def __init__(self, *args, **kwargs):
        del args, kwargs

    def to(self, device):
        del device
        return self


class StubModule(types.ModuleType):
    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Stub


class StubFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the modules of UNUSED, before the real ones."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in UNUSED:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return StubModule(spec.name)

    def exec_module(self, module):
        pass


class PlainModule(torch.nn.Module):
    """The part of LightningModule that the published loss uses."""

    device, dtype = torch.device("cpu"), torch.float32  # the device: see load

    def save_hyperparameters(self, *args, **kwargs):
        pass


def fused_attention(dit):
    """The published attention's signature over PyTorch's fused kernels."""

    def attention(q, k, v, mask, dynamic_shape):
        del dynamic_shape
        fused = torch.nn.functional.scaled_dot_product_attention
        if mask is None:
            return fused(q, k, v)
        if mask.mask_mod is dit._causal_mask:
            return fused(q, k, v, is_causal=True)
        if not hasattr(mask, "bias"):  # once for all blocks, and for all steps if it is static
            rows = len(q) if "cutoffs" in mask.mask_mod.keywords else None
            seen = create_mask(mask.mask_mod, rows, None, q.shape[2], k.shape[2], device="cpu")
            mask.bias = torch.zeros(seen.shape).masked_fill_(~seen, -torch.inf)
        return fused(q, k, v, attn_mask=mask.bias)

    return attention


def warmup(config, *, optimizer):
    """The published schedule: linear to the learning rate, then constant."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min(1.0, n / config.warmup_steps))


def load(directory: str, device: str = "cpu"):
    """The published module algo, for models on a device; with its own attention on a GPU."""
    sys.meta_path.insert(0, StubFinder())
    sys.path.insert(0, directory)
    import hydra.utils
    import lightning

    PlainModule.device = torch.device(device)
    lightning.LightningModule = PlainModule
    hydra.utils.instantiate = warmup
    import algo
    from models import dit

    if device == "cpu":
        dit.fused_flex_attention = fused_attention(dit)
    return algo


def namespace(fields: dict):
    inner = {k: namespace(v) if isinstance(v, dict) else v for k, v in fields.items()}
    return types.SimpleNamespace(**inner)


def published_config(shapes: dict, objective: str, alpha_0: float):
    """The fields of the published config that a training step reads."""
    algo_fields = ALGO[objective] | {
        "alpha_0": alpha_0,
        "batch_split": {0.0: 0.0, 1.0: 1.0}.get(alpha_0, shapes["kappa"]),
        "loss_type": "elbo",
        "prepend_token": "bos",  # predicts all L tokens, like the other objectives
        "time_conditioning": False,
        "subs_masking": False,
        "T": 0,
    }
    return namespace(
        {
            "algo": algo_fields,
            "model": {
                "hidden_size": shapes["width"],
                "cond_dim": shapes["cond_width"],
                "length": shapes["length"],
                "n_blocks": shapes["blocks"],
                "n_heads": shapes["heads"],
                "scale_by_sigma": True,
                "dropout": shapes["dropout"],
            },
            "optim": {
                "lr": shapes["learning_rate"],
                "beta1": shapes["b1"],
                "beta2": shapes["b2"],
                "eps": shapes["eps"],
                "weight_decay": shapes["weight_decay"],
            },
            "training": {
                "ema": shapes["ema"],
                "antithetic_sampling": True,
                "sampling_eps": 1e-3,
            },
            "sampling": {"predictor": "ancestral", "noise_removal": "ancestral", "p_nucleus": 1.0},
            "eval": {
                "gen_ppl_eval_model_name_or_path": "",
                "perplexity_batch_size": 1,
                "num_iw_orders": 0,
            },
            "loader": {"global_batch_size": shapes["batch_size"]},
            "attn": {"dynamic_shape": False},
            "prior": {"type": "none"},
            "lr_scheduler": {"warmup_steps": shapes["warmup_steps"]},
        }
    )


class Trainer:
    """One objective's model and its training step."""

    def __init__(self, algo, shapes: dict, objective: str, alpha_0: float):
        kind = {"ar": algo.AR, "mdlm": algo.MDLM}.get(objective, algo.EsoLM)
        tokenizer = types.SimpleNamespace(vocab_size=shapes["vocab_size"], bos_token_id=0)
        self.module = kind(published_config(shapes, objective, alpha_0), tokenizer)
        self.module.trainer = types.SimpleNamespace(
            num_nodes=1, node_rank=0, num_devices=1, local_rank=0, accumulate_grad_batches=1
        )
        self.module.to(self.module.device).train()
        self.module.ema.move_shadow_params_to_device(self.module.device)
        (self.optimizer,), (schedule,) = self.module.configure_optimizers()
        self.schedule, self.clip = schedule["scheduler"], shapes["clip"]
        size = shapes["batch_size"], shapes["length"]
        self.x = torch.randint(shapes["vocab_size"], size, device=self.module.device)
        self.valid = torch.ones(size, dtype=torch.long, device=self.module.device)

    def step(self) -> float:
        loss = self.module._loss(self.x, self.valid, 0, train_mode=True).loss
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), self.clip)
        self.optimizer.step()
        self.schedule.step()
        self.module.ema.update(self.module._get_parameters())
        return loss.item()


def begin() -> tuple[dict, Callable[[Any], None]]:
    """The first request, and a function that writes an answer. What the published code prints is
    no answer: it goes to stderr."""
    answers, sys.stdout = sys.stdout, sys.stderr

    def answer(value) -> None:
        print(json.dumps(value), file=answers, flush=True)

    torch.manual_seed(0)
    return json.loads(sys.stdin.readline()), answer


def main() -> None:
    request, answer = begin()
    torch.set_num_threads(request["threads"])
    algo = load(sys.argv[1])
    trainers = {
        name: Trainer(algo, request["shapes"], objective, alpha_0)
        for name, (objective, alpha_0) in request["objectives"].items()
    }
    answer({"torch": torch.__version__, "threads": torch.get_num_threads()})
    for line in sys.stdin:
        burst = json.loads(line)
        trainer, cpu, start = trainers[burst["name"]], time.process_time(), time.perf_counter()
        for _ in range(burst["steps"]):
            loss = trainer.step()
        seconds = time.perf_counter() - start
        answer({"seconds": seconds, "cpu_seconds": time.process_time() - cpu, "loss": loss})


if __name__ == "__main__":
    main()
