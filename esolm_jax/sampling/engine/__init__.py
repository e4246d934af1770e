"""The decoding network: everything that depends on the platform.

network.py   the trained network with adaLN folded into its weights, for few tokens
cache.py     the interface of the KV cache, explicit state; caches.py: the choice for a platform
prefix_cache.py  on CPUs: attention to prefixes of it. kernel_cache.py: on GPUs and TPUs
decode_gpu.py (decode_gpu_kernels.py), decode_tpu.py  their kernels
residual.py, project.py  the residual stream and the products of a pass;
    project_gpu.py (project_gpu_kernels.py): their kernel on GPUs, for few tokens
cpu_kernels.py  products of few rows: loops on a CPU, matrix products elsewhere
quantize.py  arrays of 8 bits: weights and caches. host_weights.py: weights rounded on the host
choose.py    logits → tokens: temperature, top-k, top-p, draws that are exact in the tails
"""
