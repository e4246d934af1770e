"""The published evaluation protocols, reproduced with their surprises: plain functions.

detokenizers.py           detokenize(name, text)
published_tokenizers.py   GPT-2's, BERT's and text8's tokenizers, as the published code uses them
published_windows.py      windows(documents, …), windows_with_mask(documents, …)
judge.py                  Judge(folder): a pretrained model that scores tokens
generative_perplexity.py  generative_perplexity(judge, texts, …): "pooled" and "bd3"
entropy.py                entropy(ids)

Use them to compare with published figures. `prepare` and `evaluate` are the package's own protocol:
they drop no text, and their figures do not depend on the batch size. docs/evaluation_protocol.md
has examples.
"""

from esolm_jax.evaluation.protocol.detokenizers import detokenize
from esolm_jax.evaluation.protocol.entropy import entropy
from esolm_jax.evaluation.protocol.generative_perplexity import generative_perplexity
from esolm_jax.evaluation.protocol.judge import Judge
from esolm_jax.evaluation.protocol.published_windows import windows, windows_with_mask

__all__ = [
    "Judge",
    "detokenize",
    "entropy",
    "generative_perplexity",
    "windows",
    "windows_with_mask",
]
