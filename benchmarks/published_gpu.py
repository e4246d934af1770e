"""Decoding and training by the published PyTorch code on one GPU: the other process of gpu.py.

    python published_gpu.py DIR

DIR is a checkout of the published implementation; this Python needs torch and einops. The first
line of stdin is JSON with the device; every further line is a case, answered by a line of JSON on
stdout. Attention is the published one on a GPU; on a CPU, for a dry run, PyTorch's fused attention
replaces it. Matrix products are bfloat16 where the published code asks for it. Stand-ins for what
is not installed: published_step.py.
"""

import json
import sys
import time

import published_step
import torch
from published_sampling import Sampler

ROUNDS = 3


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_of(run) -> float:
    synchronize()
    begin = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - begin


def decode(algo, case: dict) -> dict:
    """The whole generation at one token per pass: both of the paper's timings, after a run that
    warms up."""
    size = case["objective"], case["alpha_0"], case["shapes"]["length"]
    sampler = Sampler(algo, case["shapes"], *size)
    found = {}
    for name, passes_only in (("with sampling", False), ("passes only", True)):
        sampler.module.config.sampling.profile_throughput = passes_only and not case["dry_run"]
        passes = sampler.generate(case["rows"], 0, check=not passes_only)["nfe"]
        seconds = seconds_of(lambda: sampler.generate(case["rows"], 0, check=False))
        tokens = case["rows"] * case["shapes"]["length"]
        found[name] = {"ms_per_pass": 1e3 * seconds / passes, "tokens_per_second": tokens / seconds}
    return found


def train(algo, case: dict) -> dict:
    """Steps on one batch."""
    trainer = published_step.Trainer(algo, case["shapes"], case["objective"], case["alpha_0"])

    def steps():
        for _ in range(case["steps"]):
            loss = trainer.step()
        assert loss == loss, "the loss must be finite"

    steps()  # compiles
    seconds = min(seconds_of(steps) for _ in range(ROUNDS)) / case["steps"]
    tokens = trainer.x.numel()
    return {"ms_per_step": 1e3 * seconds, "tokens_per_second": tokens / seconds}


def main() -> None:
    request, answer = published_step.begin()
    algo = published_step.load(sys.argv[1], request["device"])
    answer({"torch": torch.__version__, "device": request["device"]})
    for line in sys.stdin:
        case = json.loads(line)
        try:
            answer({"decode": decode, "train": train}[case["what"]](algo, case))
        except Exception as error:  # the other cases are measured all the same
            answer({"error": f"{type(error).__name__}: {str(error)[:300]}"})


if __name__ == "__main__":
    main()
