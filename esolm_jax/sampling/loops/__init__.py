"""The decoding loops: jitted programs over the engine's network and cache.

loop.py         their protocol: Task, Loop (run, compile), Decoded
run_passes.py   the passes of a plan, and of a prompt
plain.py        follows the schedule
speculative.py  several tokens per pass, from the distribution of one token per pass
confidence.py   each pass generates the tokens that the model is most confident of
whole_text.py   every pass runs the whole text, and a rule says what it reveals:
                llada.py, dream.py
sdar.py         block by block, over a cache
reveal.py       which masks of a pass become known
noise.py        noise that is drawn again in every pass
"""
