"""The fields of every section, each declared once.

run.py         fields without a section: family, seed, initial weights
data.py        data                       model.py       model
devices.py     mesh, distributed          training.py    optimizer, train
evaluation.py  eval                       sampling.py    sample
"""
