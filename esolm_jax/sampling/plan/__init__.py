"""From prompts to tables that drive the decoding loop. Host side, NumPy.

prompts.py   text with [MASK] spans → token ids
canvas.py    which tokens of each text are known
schedule.py  which positions are generated in which step
passes.py    steps → forward passes of a family
"""
