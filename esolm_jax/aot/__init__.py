"""Ahead-of-time compilation: what a program costs on a pod, found without the pod.

topology.py   TPU pods that the compiler knows, and the sizes of a chip
programs.py   the programs: a training step, a batch of evaluation, a sampler step
hlo.py        costs read from optimised HLO text (hlo_parse, hlo_loops, hlo_products,
              hlo_collectives)
lower_bound.py  lower bounds: FLOPs of the model's shape, bytes of its sharding
report.py     both, side by side
"""
