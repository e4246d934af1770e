"""Validation by the published PyTorch code, on request: the other process of published_evaluation.

    python published_validation.py DIR < REQUEST

DIR is a checkout of the published Eso-LMs code. This Python needs torch and the packages of its
requirements.txt. REQUEST is JSON; the working folder gets `MODEL/checkpoints/last.ckpt` for each
model, `CASE.npz` for each case, and `versions.json`.

The published `main._train`, `main._eval_ppl`, data loader, loss and metrics run as they are. What
is replaced from outside: the location of the data sets (local files), the number of GPUs (1), the
initial weights (random ones), FlexAttention (PyTorch's fused attention with the published masks,
made on the CPU), and the shuffling of windows, unless a case asks for it.
"""

import functools
import importlib.metadata
import json
import os
import pathlib
import sys
import types
from unittest import mock

import numpy as np
import published_step
import torch

PACKAGES = ("torch", "transformers", "tokenizers", "datasets", "lightning", "torchmetrics")
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1",  # of checkpoints that this process wrote
}
CPU = (  # one CPU in place of GPUs, float32 in place of bfloat16, no logger that needs a network
    "trainer.accelerator=cpu",
    "trainer.precision=32",
    "strategy._target_=lightning.pytorch.strategies.SingleDeviceStrategy",
    "~strategy.find_unused_parameters",
    "+strategy.device=cpu",
    "loader.pin_memory=False",
    "~wandb",
    "eval.generate_samples=False",
)
TRAINING = (  # two steps, without a validation in between
    "trainer.max_steps=2",
    "trainer.val_check_interval=1.0",
    "trainer.num_sanity_val_steps=0",
    "trainer.limit_val_batches=0",
    "callbacks.checkpoint_every_n_steps.every_n_train_steps=2",
    "loader.num_workers=1",
    "training.ema=0.9",
)


class Recorder:
    """The windows, noise and losses of each validation batch."""

    def __init__(self):
        self.batches: list[dict] | None = None  # None: records nothing
        self.module = None

    def wrap(self, owner, name: str, note) -> None:
        """note(batch, arguments, result) runs after each call of a method of the published code."""
        method = getattr(owner, name)

        def call(module, *args, **kwargs):
            if self.batches is not None and name == "_loss":
                x, valid = (array(a) for a in args[:2])
                self.batches.append({"x": x.copy(), "valid": valid.copy()})
                self.module = module
            result = method(module, *args, **kwargs)
            if self.batches is not None:
                note(self.batches[-1], (args, kwargs), result)
            return result

        setattr(owner, name, call)

    def install(self, algo, trainer_base) -> None:
        for owner in (algo.EsoLM, trainer_base.TrainerBase):
            self.wrap(owner, "_loss", _note_loss)
        self.wrap(trainer_base.AbsorbingState, "q_xt", _note_noisy)
        self.wrap(trainer_base.Diffusion, "_sample_t", note_as("t"))
        self.wrap(algo.EsoLM, "_sample_t", note_as("t"))
        self.wrap(algo.EsoLM, "_sort_indices", _note_order)
        self.wrap(algo.EsoLM, "nll", _note_sorted("diffusion"))
        self.wrap(algo.EsoLM, "_reconstruction_loss", _note_sorted("sequential"))
        self.wrap(trainer_base.Diffusion, "nll", note_as("diffusion_nll"))
        self.wrap(algo.AR, "nll", note_as("diffusion_nll"))


def one_gpu():
    """Where the published code counts GPUs, it finds one: it divides by their number."""
    return mock.patch.object(torch.cuda, "device_count", lambda: 1)


def array(tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()


def note_as(name: str):
    def note(batch, arguments, result) -> None:
        del arguments
        if not isinstance(result, tuple):  # EsoLM.nll replaces Diffusion.nll
            batch[name] = array(result)

    return note


def _note_loss(batch, arguments, result) -> None:
    del arguments
    batch |= {"loss": float(result.loss), "nll": float(result.nlls)}
    batch["tokens"] = int(result.num_tokens)


def _note_noisy(batch, arguments, result) -> None:
    """z_0 is drawn before z_t; α_t is a tensor, and α_0 is not."""
    is_tensor = isinstance(arguments[0][1], torch.Tensor)
    batch["xt" if is_tensor else "z0"] = array(result)


def _note_order(batch, arguments, result) -> None:
    is_sequential = arguments[1].get("keep_masks_unshuffled", False)
    batch["sequential_order" if is_sequential else "diffusion_order"] = array(result)


def _note_sorted(phase: str):
    """The loss of each token, from generation order to text order."""

    def note(batch, arguments, result) -> None:
        del arguments
        in_order, order = map(array, result)
        in_text = np.zeros_like(in_order)
        np.put_along_axis(in_text, order, in_order, axis=1)
        batch[f"{phase}_nll"] = in_text

    return note


def local_data(dataloader, files: dict[str, str]) -> None:
    """Makes the published data loader read local files, in the format of the data sets."""
    load = dataloader.datasets.load_dataset

    def load_dataset(path, config=None, *, name=None, split=None, cache_dir=None, **unused):
        del unused
        file = files["/".join(filter(None, (path, config or name)))]
        splits = {one: file for one in ("train", "validation", "test")}
        return load("parquet", data_files=splits, split=split, cache_dir=cache_dir)

    def get(url, **unused):
        del unused
        lines = pathlib.Path(files[url]).read_text().splitlines()
        return types.SimpleNamespace(iter_lines=lambda **_: lines)

    dataloader.datasets = types.SimpleNamespace(**vars(dataloader.datasets))
    dataloader.datasets.load_dataset = load_dataset
    dataloader.requests = types.SimpleNamespace(get=get)


def shuffle_only_if(dataloader, asked: dict) -> None:
    """The published evaluation shuffles windows; published validation during training does not."""
    make = dataloader.get_dataloaders

    def get_dataloaders(*args, valid_seed=None, **kwargs):
        with one_gpu():
            return make(*args, valid_seed=valid_seed if asked["shuffle"] else None, **kwargs)

    dataloader.get_dataloaders = get_dataloaders


def with_random_weights(kind, seed: int):
    """The published model with random weights, and an average of other random weights: adaLN and
    the head start at zero, which would make every figure trivial."""

    def make(config, tokenizer):
        module = kind(config, tokenizer=tokenizer)
        generator = torch.Generator().manual_seed(seed)

        def add_noise(weights) -> None:
            for weight in weights:
                scale = 0.5 / weight.shape[-1] ** 0.5 if weight.ndim > 1 else 0.2
                weight += scale * torch.randn(weight.shape, generator=generator)

        with torch.no_grad():
            add_noise(module.backbone.parameters())
            add_noise(module.ema.shadow_params)
        return module

    return make


class Published:
    """The published modules, and what a request runs with them."""

    def __init__(self, directory: str, request: dict):
        sys.path.insert(0, directory)
        with one_gpu():  # a resolver of its config counts GPUs
            import dataloader
            import hydra
            import main

        self.dataloader, self.main, self.hydra = dataloader, main, hydra
        self.configs, self.request = f"{directory}/configs", request
        self.asked = {"shuffle": False}
        self.recorder = Recorder()
        self.install()
        local_data(dataloader, request["files"])
        shuffle_only_if(dataloader, self.asked)
        self.root = pathlib.Path.cwd()

    def install(self) -> None:
        """Replaces FlexAttention, and records."""
        import algo
        import trainer_base
        from models import dit

        dit.fused_flex_attention = published_step.fused_attention(dit)
        dit.create_block_mask = functools.partial(dit.create_block_mask, device="cpu")
        self.recorder.install(algo, trainer_base)
        self.kinds = {"ar": algo.AR, "mdlm": algo.MDLM, "esolm": algo.EsoLM}

    def run_train(self, arguments: dict, seed: int) -> None:
        kind = with_random_weights(self.kinds[arguments["config"].algo.name], seed)
        self.main._train(**arguments, diffusion_model=kind)

    def run_evaluate(self, arguments: dict) -> None:
        kind = self.kinds[arguments["config"].algo.name]
        self.main._eval_ppl(**arguments, diffusion_model=kind)

    def _arguments(self, *overrides: str) -> dict:
        judge = f"eval.gen_ppl_eval_model_name_or_path={self.request['tokenizer']}"
        with self.hydra.initialize_config_dir(self.configs, version_base=None):
            config = self.hydra.compose("config", [*CPU, judge, *overrides])
        logger = self.main.utils.get_logger("published")
        tokenizer = self.dataloader.get_tokenizer(config)
        return {"config": config, "tokenizer": tokenizer, "logger": logger}

    def train(self, name: str, overrides: list[str], seed: int) -> None:
        """Two steps of the published training, which write the published checkpoint."""
        cache = f"data.cache_dir={self.root}/cache/{name}"
        arguments = self._arguments(*TRAINING, cache, *overrides)
        (self.root / name).mkdir()
        os.chdir(self.root / name)  # checkpoints are written below it
        self.run_train(arguments, seed)
        os.chdir(self.root)

    def evaluate(self, name: str, case: dict) -> None:
        """The published evaluation of a checkpoint; writes its record."""
        self.asked["shuffle"] = case["shuffle"]
        checkpoint = f"{self.root}/{case['model']}/checkpoints/last.ckpt"
        places = [f"eval.checkpoint_path={checkpoint}", f"data.cache_dir={self.root}/cache/{name}"]
        arguments = self._arguments("mode=ppl_eval", *places, *case["overrides"])
        self.recorder.batches = []
        self.run_evaluate(arguments)
        batches, self.recorder.batches = self.recorder.batches, None
        metrics = self.recorder.module.metrics.valid_nlls.compute()
        saved = {f"{i}.{key}": value for i, b in enumerate(batches) for key, value in b.items()}
        saved |= {key.replace("val/", "final."): float(value) for key, value in metrics.items()}
        np.savez(self.root / f"{name}.npz", batches=len(batches), **saved)


def run(kind: type[Published]) -> None:
    os.environ |= ENVIRONMENT
    request = json.load(sys.stdin)
    torch.set_num_threads(request["threads"])
    published = kind(sys.argv[1], request)
    for seed, (name, overrides) in enumerate(request["models"].items()):
        published.train(name, overrides, seed)
    for name, case in request["cases"].items():
        print(f"published: {name}", file=sys.stderr)
        published.evaluate(name, case)
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    pathlib.Path("versions.json").write_text(json.dumps(versions))


if __name__ == "__main__":
    run(Published)
