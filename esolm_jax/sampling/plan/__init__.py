"""Prompts → the tables that drive the decoding loop. Host side, NumPy.

prompts.py   text with [MASK] spans → token ids
canvas.py    the known tokens of each text
schedule.py  the positions that each step generates
passes.py    steps → forward passes of a family
"""
