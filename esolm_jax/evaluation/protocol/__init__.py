"""The published evaluation protocols, reproduced with their surprises: plain functions.

(data/detokenizers.py)   detokenize(name, text)
published_windows.py     windows(documents, tokenizer, …), windows_with_mask
judge.py                 Judge(folder): a pretrained model that scores tokens
published_perplexity.py  generative_perplexity(judge, texts, …): "pooled" and "bd3"
unigram_entropy.py       entropy(ids)
published_nelbo.py       sums of the NELBO from given noise: κ-split Eso-LM, MDLM, AR, IW bound
multiple_choice.py       scores of LLaDA's and Duo's harnesses, from given masks

Use them to compare with published figures. `prepare` and `evaluate` are the package's own protocol:
they drop no text, and their figures do not depend on the batch size. docs/evaluation_protocol.md
has examples.
"""

from esolm_jax.data.detokenizers import detokenize
from esolm_jax.evaluation.protocol.judge import Judge
from esolm_jax.evaluation.protocol.multiple_choice import (
    draw_masks,
    duo_ar_score,
    duo_full_score,
    duo_suffix_score,
    encode_pair,
    llada_score,
)
from esolm_jax.evaluation.protocol.published_nelbo import (
    BatchNelbo,
    diffusion_rows,
    nelbo_figures,
)
from esolm_jax.evaluation.protocol.published_perplexity import generative_perplexity
from esolm_jax.evaluation.protocol.published_windows import (
    WindowSettings,
    windows,
    windows_with_mask,
)
from esolm_jax.evaluation.protocol.unigram_entropy import entropy

__all__ = [
    "BatchNelbo",
    "Judge",
    "WindowSettings",
    "detokenize",
    "diffusion_rows",
    "draw_masks",
    "duo_ar_score",
    "duo_full_score",
    "duo_suffix_score",
    "encode_pair",
    "entropy",
    "generative_perplexity",
    "llada_score",
    "nelbo_figures",
    "windows",
    "windows_with_mask",
]
