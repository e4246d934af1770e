"""Four labels, one rule of attention, and the families that differ in their labels.

    labels.py      the four labels of a token: Tokens, Layout, LabelledBatch
    rule.py        visible(): which token reads which
    noise.py       the noise schedule: the fraction of a text that is known at time t
    order.py       generation orders: clean tokens first, then masked ones
    streams.py     copies of a text in generation order
    phase.py       a term of a loss: draws masks and an order, and labels the tokens
    family.py      Family: everything that distinguishes one family from another
    ar.py, mdlm.py, mdlm_shifted.py, bd3.py, eso_a.py, eso_b.py
                   one family each: its labels, phases and decoding windows
    registry.py    the families by name
    trim.py        drops query copies that reach no loss

Imports errors only. The model is independent of the family.
"""
