"""Checkpoints of the published implementation, under its parameter names.

file.py    opens a .ckpt or safetensors file
config.py  the config of the run that wrote it
names.py   its parameter names ↔ our pytree; load() returns a model
read.py    file → workdir
write.py   workdir → file
"""
