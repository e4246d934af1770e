"""The published small model (768 x 12) at L = 128, as trained on LM1B.

    python -m esolm_jax.prepare --config=configs/lm1b.py:0.5 --workdir=runs/lm1b
    python -m esolm_jax.train --config=configs/lm1b.py:0.5 --workdir=runs/lm1b

The argument after the colon is alpha_0 of Eso-LM (B), or one of ar, mdlm, bd3, eso_a.

Hardware: 16 chips of v5e; as compiled for v5e:4x4, 4.5 of 16 GiB a chip, a step of 17 ms or more
(MFU 92 % at most). Expected: the paper's test perplexities (NELBO) are 36.12, 32.53, 26.29 and
21.86 for alpha_0 = 1, 0.5, 0.125, 0 and 31.78 for mdlm; they were not reproduced here.
"""

from configs import owt


def get_config(family: str = "0.5"):
    config = owt.get_config(family)
    with config.unlocked():
        config.data.source = "tfds:lm1b"
        config.data.train = "train"
        config.data.test = "test"
        config.data.seq_len = 128
        config.data.vocab_size = 30522  # as bert-base-uncased's
        config.model.remat = "none"
        config.train.grad_accumulation = 1
        config.train.steps = 1_000_000
    return config
