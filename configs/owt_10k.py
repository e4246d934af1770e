"""Fine-tunes a model of owt.py to texts of L = 10240 tokens.

    python -m esolm_jax.prepare --config=configs/owt_10k.py:runs/owt --workdir=runs/owt_10k
    python -m esolm_jax.train --config=configs/owt_10k.py:runs/owt --workdir=runs/owt_10k

The argument after the colon is the workdir of a run of owt.py, or WORKDIR@STEP. Its family,
alpha_0, model, files and tokenizer are those of the new run; training starts from its EMA weights
with a new optimizer state, and longer texts need no new parameters (RoPE).

Hardware: 16 chips of v5e; as compiled for v5e:4x4 with eso_b, alpha_0 = 0.5 and 64 texts, 11.7 of
16 GiB a chip, a step of 0.43 s or more (MFU 76 % at most). On GPUs, set --config.mesh.fsdp=1
--config.model.remat=operands --config.train.grad_accumulation=1: as compiled for h100:8, 44.9 of 79
GiB and 0.22 s or more. The batch has as many tokens as 1.25 batches of owt.py; steps and warm-up
are ours. Expected: no published figure, none measured here.

Tried on a CPU at the full length, with a model of width 16 and one block that owt.py had trained at
L = 1024: the commands above with --config.train.batch_size=2 --config.train.steps=2, `evaluate`,
and `sample` (10,240 tokens, one per pass). A batch of 2 needs --config.train.grad_accumulation=1.
"""

from esolm_jax.errors import UserError
from esolm_jax.training import checkpoint_meta, checkpoint_steps


def get_config(workdir: str = ""):
    if not workdir:
        raise UserError("--config=configs/owt_10k.py:WORKDIR: must name the workdir of an owt run")
    config = checkpoint_meta.saved_config(*checkpoint_steps.split_source(workdir))
    with config.unlocked():
        config.init_from = workdir
        config.data.dir = ""
        config.data.seq_len = 10240
        config.model.remat = "matmuls"
        config.optimizer.warmup_steps = 500
        config.train.batch_size = 64
        config.train.steps = 10_000
        config.train.anneal_steps = 0  # the weights are trained at alpha_0 already
        config.eval.batch_size = 64
        config.sample.length = 0  # the new seq_len
    return config
