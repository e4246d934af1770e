"""Evaluation: likelihood bounds of a trained model on a split.

batches.py          batches of the windows of a split, on a mesh
likelihood.py       the NELBO and the importance-weighted bound, with standard errors
window_noise.py     the same bounds with noise of the windows, not of the batches
published_bound.py  the NELBO by the published protocol
suite/              several data sets in one run: evaluate --suite
report/             bounds by position and data set, calibration: evaluate --report
text_likelihood.py  log-likelihoods of single texts, for the Python API
masked_likelihood.py
                    log-likelihoods of answers by LLaDA's and Dream's protocols
answers.py          a file of prompts and answers → their log-likelihoods
sampler_likelihood.py  the likelihood of the sampler that config.sample describes
answer_likelihood.py  log p(answer | prompt), for lm-evaluation-harness
sampler_metric.py   that likelihood as a metric
provenance.py       which data, windows and unigram baseline a figure belongs to
protocol/           published protocols: detokenizers, windows, generative perplexity, entropy
quality/            generated texts under a judge: perplexity, diversity, MAUVE
"""
