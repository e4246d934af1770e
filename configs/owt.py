"""The published small model (768 x 12) at L = 1024, as trained on OpenWebText.

    python -m esolm_jax.prepare --config=configs/owt.py:0.5 --workdir=/mnt/bucket/owt \\
        --config.data.train='/mnt/bucket/text/*.jsonl'
    python -m esolm_jax.train --config=configs/owt.py:0.5 --workdir=/mnt/bucket/owt \\
        --config.data.train='/mnt/bucket/text/*.jsonl'

The argument after the colon is alpha_0 of Eso-LM (B), or one of ar, mdlm, bd3, eso_a: `owt.py:1`,
`owt.py:0.125`, `owt.py:mdlm`. The documents are yours to bring, in any form that `prepare` reads.

Hardware: 16 chips of v5e, with 16 rows of a micro-batch on each: a step of 0.16 s or more (MFU 91 %
at most). As one micro-batch of 32 rows it needs 17.5 of 16 GiB, as compiled for v5e:4x4; as two,
about 9. On one H100, 32 rows of mdlm take 10.8 of 79 GiB (docs/training_cost.md): a node of eight
is fastest with --config.mesh.fsdp=1. Beyond 128 chips, set --config.train.grad_accumulation=1.
Expected: the paper's test perplexities (NELBO) are 30.06, 27.94, 21.92 and 17.78 for alpha_0 = 1,
0.5, 0.125, 0 and 25.19 for mdlm; they were not reproduced here.
"""

from esolm_jax.config import default_config

OTHERS = {"ar": ("ar", 0.0), "mdlm": ("mdlm", 1.0), "bd3": ("bd3", 1.0), "eso_a": ("eso_a", 0.5)}


def get_config(family: str = "0.5"):
    config = default_config()
    config.objective, config.alpha_0 = OTHERS.get(family) or ("eso_b", float(family))
    config.data.source = "text"
    config.data.seq_len = 1024
    config.data.vocab_size = 50257  # as GPT-2's
    config.model.width = 768
    config.model.blocks = 12
    config.model.heads = 12
    config.model.cond_width = 0 if config.objective == "ar" else 128
    config.model.dropout = 0.1
    config.model.dtype = "bfloat16"
    config.model.remat = "matmuls"
    config.train.batch_size = 512
    config.train.grad_accumulation = 2
    config.train.steps = 250_000
    config.mesh.data = -1
    config.mesh.fsdp = 4
    config.eval.batch_size = 256
    return config
