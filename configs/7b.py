"""A Llama-style model of 7 billion parameters (4096 x 32; RMSNorm, SwiGLU, grouped-query
attention, no adaLN) at L = 8192.

    python -m esolm_jax.prepare --config=configs/7b.py:0.5 --workdir=/mnt/bucket/7b \\
        --config.data.files='/mnt/bucket/text/*.jsonl'
    python -m esolm_jax.train --config=configs/7b.py:0.5 --workdir=/mnt/bucket/7b \\
        --config.data.files='/mnt/bucket/text/*.jsonl'

The last 100,000 documents are held out. A SentencePiece tokenizer is trained.

Hardware: 512 chips of v5p; as compiled for v5p:8x8x8, 81.4 of 95 GiB a chip and a step of 2.4 s or
more (MFU 91 % at most). At L = 10240, set --config.model.remat=attention: 29.7 GiB, 3.8 s. On 64
H100s, set --config.mesh.fsdp=8 --config.model.remat=attention --config.train.grad_accumulation=8:
as compiled for h100:8x8, 45.6 of 79 GiB and 12.2 s or more. Expected: not trained here.
"""

from configs import owt


def get_config(family: str = "0.5"):
    config = owt.get_config(family)
    with config.unlocked():
        config.data.seq_len = 8192
        config.data.tokenizer = "sentencepiece"
        config.data.tokenizer_ids = 0
        config.data.vocab_size = 32000
        config.model.style = "llama"
        config.model.cond_width = 0
        config.model.width = 4096
        config.model.blocks = 32
        config.model.heads = 32
        config.model.kv_heads = 8
        config.model.mlp_width = 14336
        config.model.dropout = 0.0
        config.optimizer.b2 = 0.95
        config.optimizer.weight_decay = 0.1
        config.optimizer.schedule = "cosine"
        config.train.batch_size = 1024
        config.train.grad_accumulation = 1
        config.train.steps = 100_000
        config.mesh.fsdp = 64
        config.eval.batch_size = 512
    return config
