"""A model of 2.1 billion parameters (2176 x 28, 17 heads) at L = 1024, recipe of owt.py.

    python -m esolm_jax.prepare --config=configs/2b.py:0.5 --workdir=/mnt/bucket/2b \\
        --config.data.files='/mnt/bucket/text/*.jsonl' --config.data.tokenizer_path=GPT2
    python -m esolm_jax.train --config=configs/2b.py:0.5 --workdir=/mnt/bucket/2b \\
        --config.data.files='/mnt/bucket/text/*.jsonl' --config.data.tokenizer_path=GPT2

GPT2 and the split of the files are as in owt.py.

Hardware: 256 chips of v5e; as compiled for v5e:16x16, 4.9 of 16 GiB a chip, a step of 0.18 s
or more (MFU 77 % at most); two such slices with a batch of 1024: 5.6 GiB.
Expected: below medium.py's perplexities; not trained here.
"""

from configs import owt


def get_config(family: str = "0.5"):
    config = owt.get_config(family)
    with config.unlocked():
        config.model.width = 2176
        config.model.blocks = 28
        config.model.heads = 17
        config.model.dropout = 0.0
        config.model.remat = "full"
        config.mesh.fsdp = 16
    return config
