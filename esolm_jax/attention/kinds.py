"""The names of the implementations of attention: the allowed values of config.model.attention.

Imports nothing, so that the config can be read without JAX.
"""

KINDS = ("dense", "chunked", "flash", "cudnn", "splash")
PLATFORM = {"flash": "gpu", "cudnn": "gpu", "splash": "tpu"}  # of a kernel
INTERPRETED = ("flash_interpret", "cudnn_interpret", "splash_interpret")  # for tests: on any device
CUDNN_WIDTH = 128  # of a head, at most; Hopper and newer take 256
