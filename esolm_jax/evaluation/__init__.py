"""Evaluation: likelihood bounds of a trained model on a split.

batches.py          batches of the windows of a split, on a mesh
likelihood.py       the NELBO and the importance-weighted bound, with standard errors
window_noise.py     the same bounds with noise of the windows, not of the batches
published_bound.py  the NELBO by the published protocol
suite/              several data sets in one run: evaluate --suite
text_likelihood.py  log-likelihoods of single texts, for the Python API
provenance.py       which data, windows and unigram baseline a figure belongs to
protocol/           published protocols: detokenizers, windows, generative perplexity, entropy
"""
