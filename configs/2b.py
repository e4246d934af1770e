"""A model of 2.1 billion parameters (2176 x 28, 17 heads) at L = 1024, recipe of owt.py.

    python -m esolm_jax.train --config=configs/2b.py:0.5 --workdir=/mnt/bucket/2b \\
        --config.data.train='/mnt/bucket/text/*.jsonl'
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
