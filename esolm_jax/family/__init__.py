"""The idea: four labels, one rule of attention, and the families that differ in their labels.

    labels.py      the four labels of a token: Tokens, Layout, Labelled
    rule.py        visible(): which token reads which
    noise.py       the noise schedule: which fraction of a text is known at time t
    order.py       generation orders: clean tokens first, then masked ones
    streams.py     copies of a text, laid out in generation order
    phase.py       a term of a loss: draws masks and an order, and labels the tokens
    family.py      Family: everything that distinguishes one family from another
    ar.py, mdlm.py, bd3.py, eso_a.py, eso_b.py
                   one family each: its labels, phases and decoding windows
    registry.py    the families by name
    trim.py        drops query copies that reach no loss

Imports nothing else of the package but errors. The model never learns which family it is in.
"""
