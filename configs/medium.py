"""A medium model (1024 x 24) at L = 1024, with the data and recipe of owt.py.

    python -m esolm_jax.prepare --config=configs/medium.py:0.5 --workdir=/mnt/bucket/medium \\
        --config.data.files='/mnt/bucket/text/*.jsonl' --config.data.tokenizer_path=GPT2
    python -m esolm_jax.train --config=configs/medium.py:0.5 --workdir=/mnt/bucket/medium \\
        --config.data.files='/mnt/bucket/text/*.jsonl' --config.data.tokenizer_path=GPT2

GPT2 and the split of the files are as in owt.py.

Hardware: 64 chips of v5e; as compiled for v5e:8x8, 12.6 of 16 GiB a chip and a step of 0.12 s or
more (MFU 92 % at most). On GPUs, set --config.mesh.fsdp=1 --config.model.remat=operands
--config.train.grad_accumulation=2: as compiled for h100:8, 52.9 of 79 GiB and 0.30 s or more.
Expected: below owt.py's perplexities; no published figure, none measured here.
"""

from configs import owt


def get_config(family: str = "0.5"):
    config = owt.get_config(family)
    with config.unlocked():
        config.model.width = 1024
        config.model.blocks = 24
        config.model.heads = 16
        config.train.grad_accumulation = 1
    return config
