"""lm-evaluation-harness: the model "esolm" of the package lm_eval (extra lm-eval).

adapter.py      EsolmLM: the harness's requests, as texts
protocols.py    how a request is scored: exact, or by the Monte Carlo of LLaDA's or Duo's harness
__main__.py     python -m esolm_jax.harness: lm_eval's command line with this model

evaluation/answer_likelihood.py computes the exact scores. See docs/harness.md.
"""
