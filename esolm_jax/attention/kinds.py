"""The names of the implementations of attention: the allowed values of config.model.attention.

Imports nothing, so that the config can be read without JAX.
"""

KINDS = ("dense", "chunked", "flash", "splash")
PLATFORM = {"flash": "gpu", "splash": "tpu"}  # of a kernel
INTERPRETED = ("flash_interpret", "splash_interpret")  # for tests: on any device, in Python
