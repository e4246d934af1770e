"""Softmax attention under the rule of labels: one signature, several implementations.

attend.py     attend(): chooses an implementation and places it on the mesh
dense.py      the scores of all pairs: the plain reference
recompute.py  the custom VJP that the next three share; which blocks can be skipped
lean.py       chunked XLA in linear memory, on any device
flash.py      block-sparse Pallas kernels for GPUs, for any labels
splash.py     a block-sparse Pallas kernel for TPUs, for labels that follow from a layout
"""
