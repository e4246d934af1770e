"""The published small model (768 x 12) on LM1B at L = 128, sentences wrapped.

    python -m esolm_jax.prepare --config=configs/lm1b_wrap.py:0.5 --workdir=runs/lm1b \\
        --config.data.tokenizer_path=BERT
    python -m esolm_jax.train --config=configs/lm1b_wrap.py:0.5 --workdir=runs/lm1b \\
        --config.data.tokenizer_path=BERT

The argument after the colon is alpha_0 of Eso-LM (B), or one of ar, mdlm, bd3, eso_a. BERT is a
folder with tokenizer.json or vocab.txt of huggingface.co/google-bert/bert-base-uncased. The text is
lm1b of TFDS; for files of your own add --config.data.source=text, --config.data.train=FILES,
--config.data.validation=FILES and --config.data.test=FILES.

As published, sentences are detokenized and separated by [CLS], a window is [CLS], 126 tokens and
[CLS], and the test split is scored. The perplexities cannot be compared with those of lm1b_pad.py.

Hardware: 16 chips of v5e; as compiled for v5e:4x4, 4.7 of 16 GiB a chip, a step of 17 ms or more
(MFU 92 % at most). On GPUs, set --config.mesh.fsdp=1: as compiled for h100:8, 9.4 of 79 GiB and 18
ms or more. Published test perplexities (NELBO; exact or importance-weighted in brackets):

    eso_b, alpha_0 = 1  36.12 (31.65)      ar      (22.83)
                  0.5   32.53 (28.07)      mdlm  31.78 (26.82)
                  0.125 26.29 (23.02)      bd3   28.23, blocks of 4
                  0           (21.86)

Source: Table 1 of Eso-LMs (arXiv 2506.01928), as on its project page s-sahoo.com/Eso-LMs. ar is the
Transformer without adaLN, as here; with adaLN, 21.86. bd3 is from arXiv 2503.09573 on LM1B.
They were not reproduced here. What differs: every token is in a window (published: the rest of each
group of 1000 sentences is dropped; --config.data.window_mode=published), and `evaluate` gives every
window both terms of the NELBO (published: half of the windows each; the same expectation).
"""

from configs import owt


def get_config(family: str = "0.5"):
    config = owt.get_config(family)
    with config.unlocked():
        config.data.source = "tfds:lm1b"
        config.data.train = "train"
        config.data.validation = "test"
        config.data.test = "test"
        config.data.detokenizer = "lm1b"
        config.data.seq_len = 128
        config.data.document_end = "bos"
        config.data.window_specials = "bos_bos"
        config.data.tokenizer = "bert"
        config.data.tokenizer_ids = 30522
        config.model.remat = "none"
        config.train.grad_accumulation = 1
        config.train.steps = 1_000_000
    return config
