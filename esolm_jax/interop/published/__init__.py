"""Checkpoints of the published implementation, under its parameter names.

file.py            opens a .ckpt or safetensors file
config.py          the config of the run that wrote it
reference.py       its parameter names ↔ our pytree; load() returns a model
into_workdir.py    file → workdir
out_of_workdir.py  workdir → file
"""
