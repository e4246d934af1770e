"""Ahead-of-time compilation: the cost of a program on a pod, computed without the pod.

chips.py        the specifications of TPUs and GPUs
topology.py     TPU pods and GPU clusters that the compilers support
evaluation.py   a batch of evaluation; decoding.py: the loop of `sample`
artefacts.py    the StableHLO files of an export
hlo.py          costs from optimised HLO text (hlo_parse, hlo_loops, hlo_products, hlo_collectives)
hlo_traffic.py  what a program or one pass of its loop launches, reads and writes
lower_bound.py  lower bounds: FLOPs of the model's shape, bytes of its sharding
report.py       compares a training step with them
sweep.py        the fastest mesh, remat policy and micro-batches of a config
"""
