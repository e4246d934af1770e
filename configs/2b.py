"""A model of 2.1 billion parameters (2176 x 28, 17 heads) at L = 1024, recipe of owt.py.

    python -m esolm_jax.prepare --config=configs/2b.py:0.5 --workdir=/mnt/bucket/2b \\
        --config.data.files='/mnt/bucket/text/*.jsonl' --config.data.tokenizer_path=GPT2
    python -m esolm_jax.train --config=configs/2b.py:0.5 --workdir=/mnt/bucket/2b \\
        --config.data.files='/mnt/bucket/text/*.jsonl' --config.data.tokenizer_path=GPT2

GPT2 and the split of the files are as in owt.py.

Hardware: 256 chips of v5e; as compiled for v5e:16x16, 7.6 of 16 GiB a chip and a step of 0.14 s
or more (MFU 94 % at most). Two such slices take a batch of 1024. On H100s, set
--config.mesh.fsdp=8 --config.model.remat=operands: as compiled for h100:8, 16 rows a GPU take 57.2
of 79 GiB and 0.30 s or more. Expected: below medium.py's perplexities; not trained here.
"""

from configs import owt


def get_config(family: str = "0.5"):
    config = owt.get_config(family)
    with config.unlocked():
        config.model.width = 2176
        config.model.blocks = 28
        config.model.heads = 17
        config.model.dropout = 0.0
        config.train.grad_accumulation = 1
        config.mesh.fsdp = 16
    return config
