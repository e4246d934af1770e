"""The published small model (768 x 12) on OpenWebText at L = 1024.

    python -m esolm_jax.prepare --config=configs/owt.py:0.5 --workdir=/mnt/bucket/owt \\
        --config.data.files='/mnt/bucket/openwebtext/*.parquet' --config.data.tokenizer_path=GPT2
    python -m esolm_jax.train --config=configs/owt.py:0.5 --workdir=/mnt/bucket/owt \\
        --config.data.files='/mnt/bucket/openwebtext/*.parquet' --config.data.tokenizer_path=GPT2

The argument after the colon is alpha_0 of Eso-LM (B), or one of ar, mdlm, bd3, eso_a: `owt.py:1`,
`owt.py:0.125`, `owt.py:mdlm`. GPT2 is a folder with tokenizer.json, or vocab.json and merges.txt,
of huggingface.co/openai-community/gpt2. The files are `openwebtext` of the Hugging Face hub, or
documents of your own in any form that `prepare` reads; the last 100,000 documents are held out and
scored, as published. EOS ends every document, and windows have no special tokens around them.

Hardware: 16 chips of v5e; as compiled for v5e:4x4, 9.9 of 16 GiB a chip and a step of 0.16 s or
more (MFU 91 % at most), in two micro-batches; one would need 17.5 GiB. With more than 128 chips,
set --config.train.grad_accumulation=1. On GPUs, set --config.mesh.fsdp=1
--config.model.remat=operands --config.train.grad_accumulation=1: as compiled for one H100, 32 rows
of 0.5 take 19.4 of 79 GiB and 0.054 s or more (docs/training_cost.md). owt_10k.py is for texts of
L = 10240.

Published test perplexities (NELBO; exact or importance-weighted in brackets):

    eso_b, alpha_0 = 1  30.06 (29.31)      ar     (17.90)
                  0.5   27.94 (26.61)      mdlm  25.19
                  0.125 21.92 (20.53)      bd3   20.96, blocks of 4
                  0           (17.78)

Source: Table 1 of Eso-LMs (arXiv 2506.01928), as on its project page s-sahoo.com/Eso-LMs. ar is the
Transformer without adaLN, as here; with adaLN, 17.78.
They were not reproduced here. What differs: every token is in a window (published: the rest of each
group of 1000 documents is dropped; --config.data.window_mode=published), and `evaluate` gives every
window both terms of the NELBO (published: half of the windows each; the same expectation).
"""

from esolm_jax.config import default_config

OTHERS = {"ar": ("ar", 0.0), "mdlm": ("mdlm", 1.0), "bd3": ("bd3", 1.0), "eso_a": ("eso_a", 0.5)}


def get_config(family: str = "0.5"):
    config = default_config()
    config.objective, config.alpha_0 = OTHERS.get(family) or ("eso_b", float(family))
    config.data.source = "text"
    config.data.train = "train[:-100000]"  # of config.data.files
    config.data.validation = config.data.test = "train[-100000:]"
    config.data.seq_len = 1024
    config.data.tokenizer = "gpt2"
    config.data.tokenizer_ids = 50257
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
