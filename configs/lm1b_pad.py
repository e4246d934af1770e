"""The published small model (768 x 12) on LM1B at L = 128, one sentence per window.

    python -m esolm_jax.prepare --config=configs/lm1b_pad.py:0.5 --workdir=runs/lm1b_pad \\
        --config.data.tokenizer_path=BERT
    python -m esolm_jax.train --config=configs/lm1b_pad.py:0.5 --workdir=runs/lm1b_pad \\
        --config.data.tokenizer_path=BERT

Argument, BERT and text as in lm1b_wrap.py. A window is [CLS], a sentence and [SEP], padded to 128
tokens, as in SEDD and the first table of MDLM; padding is not scored. Wrapped and padded windows
give very different perplexities.

Hardware: as lm1b_wrap.py. Expected: Table 1 of Eso-LMs (arXiv 2506.01928) has figures for padded
windows of other models alone (SEDD 32.71); none were measured here. What differs from the published
code: padding is not read by other tokens.
"""

from configs import lm1b_wrap


def get_config(family: str = "0.5"):
    config = lm1b_wrap.get_config(family)
    with config.unlocked():
        config.data.packing = "pad"
        config.data.document_end = "none"
        config.data.window_specials = "bos_eos"
    return config
