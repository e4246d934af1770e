"""Evaluation: likelihood bounds of a trained model on a split.

batches.py     batches of the windows of a split, on a mesh
likelihood.py  the NELBO and the importance-weighted bound, with standard errors
provenance.py  which data, windows and unigram baseline a figure belongs to
"""
