"""Ahead-of-time compilation: the cost of a program on a pod, computed without the pod.

chips.py        specifications of devices, by name and by the kind that JAX reports
topology.py     TPU pods and GPUs that the compiler supports
programs.py     the programs: a training step, a batch of evaluation, a sampler step
hlo.py          costs from optimised HLO text (hlo_parse, hlo_loops, hlo_products, hlo_collectives)
lower_bound.py  lower bounds: FLOPs of the model's shape, bytes of its sharding
report.py       compares both
"""
