"""The idea: four labels, one rule of attention, and the families that differ in their labels.

    labels.py      the four labels of a token: Tokens, Layout, Labelled
    rule.py        visible(): which token reads which
    noise.py       the noise schedule: which fraction of a text is known at time t
    order.py       generation orders: clean tokens first, then masked ones
    objectives.py  one labelling per family and phase: (key, x, valid) → Labelled
    trim.py        drops query copies that reach no loss

Imports nothing else of the package. The model never learns which family it is in.
"""
