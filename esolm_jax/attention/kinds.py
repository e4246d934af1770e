"""The names of the implementations of attention: the allowed values of config.model.attention.

Imports nothing, so that the config can be read without JAX.
"""

KINDS = ("dense", "lean", "flash", "splash")
PLATFORM = {"flash": "gpu", "splash": "tpu"}  # the platform that a kernel is for
INTERPRETED = ("flash_interpret", "splash_interpret")  # kernels in Python, on any device, for tests
