"""The jitted decoding loops. Each follows a plan over a KV cache.

decode.py     one pass per step of the plan, for every family
speculate.py  several tokens a pass with the distribution of one token a pass
confident.py  each pass generates the tokens that the model is most certain of
"""
