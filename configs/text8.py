"""The published small model (768 x 12) on text8 at L = 256 characters.

    python -m esolm_jax.prepare --config=configs/text8.py:0.5 --workdir=runs/text8 \\
        --config.data.train=text8.zip
    python -m esolm_jax.train --config=configs/text8.py:0.5 --workdir=runs/text8 \\
        --config.data.train=text8.zip

The argument after the colon is alpha_0 of Eso-LM (B), or one of ar, mdlm, bd3, eso_a. text8.zip is
that of http://mattmahoney.net/dc/text8.zip: 90, 5 and 5 million characters are train, validation
and test. 27 characters and 8 special tokens; bits per character are the bits per token.

A window is 256 characters, and the last short one is dropped, as for tables of bits per character.
The published code's defaults are other windows, [BOS], 254 tokens and [EOS] with an [EOS] every 256
characters: --config.data.document_end=eos --config.data.window_specials=bos_eos.

Hardware: 16 chips of v5e; as compiled for v5e:4x4, 8.8 of 16 GiB a chip, a step of 30 ms or more
(MFU 92 % at most). On GPUs, set --config.mesh.fsdp=1 --config.model.remat=operands: as compiled for
h100:8, 10.1 of 79 GiB and 26 ms or more. Expected: no published figures of Eso-LMs are known to us
(Table 1 of arXiv 2506.01928 is of LM1B and OpenWebText); none were measured here. The recipe is
that of lm1b_wrap.py.
"""

from configs import owt


def get_config(family: str = "0.5"):
    config = owt.get_config(family)
    with config.unlocked():
        config.data.source = "text8"
        config.data.train = ""
        config.data.validation = ""
        config.data.test = ""
        config.data.seq_len = 256
        config.data.document_end = "none"
        config.data.window_mode = "published"
        config.data.tokenizer = "text8"
        config.data.tokenizer_ids = 0
        config.model.remat = "none"
        config.train.grad_accumulation = 1
        config.train.steps = 1_000_000
    return config
