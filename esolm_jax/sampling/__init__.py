"""Sampling: a prompt becomes a plan, and a jitted loop over a KV cache follows it.

plan/        host side, NumPy: what is known, which positions are generated when
engine/      the network of decoding, its KV cache, and draws from logits
loops/       the jitted loops: plain, speculative, by confidence
generate.py  carries out config.sample: a plan and the loop that follows it
trace.py     which pass generated each token, as a page and a picture
"""
