"""The decoding network: everything that depends on the platform.

network.py   the trained network with adaLN folded into its weights, for few tokens
cache.py     the KV cache as explicit state, and exact attention to it
cpu_kernels.py  products of few rows: loops on a CPU, matrix products elsewhere
choose.py    logits → tokens: temperature, top-k, top-p, draws that are exact in the tails
"""
