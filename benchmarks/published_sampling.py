"""Sampling by the published PyTorch code, on request: the other process of sampling.py.

    python published_sampling.py DIR

DIR is a checkout of the published implementation; this Python needs torch and einops. The first
line of stdin is JSON, the shapes; every further one asks for a generation and is answered by a line
of JSON on stdout. Nothing runs in between. Stand-ins for what is not installed: published_step.py.

The samplers are the published ones: Eso-LM (B) and AR with their KV cache, whose attention is plain
PyTorch, and MDLM, whose FlexAttention is replaced by PyTorch's fused kernels. The seconds are what
they report: orders are drawn before their clock starts.
"""

import json
import sys
import time
import types

import published_step
import torch

TRAINING = {  # that published_step's config asks for, and sampling does not
    "batch_size": 1,
    "dropout": 0.0,
    "kappa": 0.5,
    "learning_rate": 0.0,
    "b1": 0.9,
    "b2": 0.999,
    "eps": 1e-8,
    "weight_decay": 0.0,
    "ema": 0.0,
    "warmup_steps": 1,
}
SAMPLING = {
    "kv_cache": True,
    "profile_throughput": False,  # its True leaves the drawing of tokens out
    "subcontext_len": 0,
    "use_ar_order": False,
    "use_block_ar_order": False,
}


class Sampler:
    """A model with random weights, whose text length is fixed."""

    def __init__(self, algo, shapes: dict, objective: str, alpha_0: float, length: int):
        kind = {"ar": algo.AR, "mdlm": algo.MDLM}.get(objective, algo.EsoLM)
        tokenizer = types.SimpleNamespace(vocab_size=shapes["vocab_size"], bos_token_id=0)
        shapes = TRAINING | shapes | {"length": length}
        config = published_step.published_config(shapes, objective, alpha_0)
        vars(config.sampling).update(SAMPLING)
        self.length, self.module = length, kind(config, tokenizer).eval()
        self.module.to(self.module.device)
        with torch.no_grad():
            for weight in self.module.parameters():
                if not weight.any():  # adaLN and the head are zero before training
                    weight.normal_(std=0.02)

    @torch.no_grad()
    def generate(self, batch: int, num_steps: int, *, check: bool = True) -> dict:
        """num_steps = 0: one token per pass, which the published sampler does for α₀ < 1 only in
        its sequential phase; told the sizes of the steps, it does so in any. `check`: that no
        mask is left."""
        if num_steps == 0:
            self.module._tokens_unmasked_per_step = lambda _: [1] * self.length
        cpu = time.process_time()
        x, nfe, seconds = self.module.generate_samples(batch, num_steps=num_steps or self.length)
        assert x.shape == (batch, self.length)
        assert not check or not (x == self.module.mask_index).any()
        return {"seconds": seconds, "nfe": int(nfe), "cpu_seconds": time.process_time() - cpu}


def main() -> None:
    request, answer = published_step.begin()
    algo = published_step.load(sys.argv[1])
    answer({"torch": torch.__version__})
    warm = set()
    for line in sys.stdin:
        r = json.loads(line)
        torch.set_num_threads(r["threads"])
        name = r["objective"], r["alpha_0"]
        if (name, r["threads"]) not in warm:  # the first kernels take longer
            Sampler(algo, request["shapes"], *name, 32).generate(r["batch"], 4)
            warm.add((name, r["threads"]))
        sampler = Sampler(algo, request["shapes"], *name, r["length"])
        answer(sampler.generate(r["batch"], r["num_steps"]))


if __name__ == "__main__":
    main()
