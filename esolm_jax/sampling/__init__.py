"""Sampling: a prompt becomes a plan, and a jitted loop over a KV cache follows it.

plan/        host side, NumPy: known tokens, and the positions that each pass generates
engine/      the network of decoding, its KV cache, and draws from logits
loops/       the jitted loops: plain, speculative, by confidence
generate.py  runs config.sample: a plan and the loop that follows it
published_loops.py
             config.sample → the loops of LLaDA, Dream and SDAR
trace.py     which pass generated each token, as a page and a picture
"""
