"""The process that runs a verb: signals, streams, exit codes, JAX settings.

startup.py           setup before JAX is imported
failures.py          one line on stderr and an exit code for each kind of failure
interrupts.py        SIGINT and SIGTERM
standard_streams.py  standard output that survives a closed pipe
jax_settings.py      settings of JAX from the environment: fixed or recorded
background.py        a call in a thread of its own
compilation_cache.py the user's folder of compiled programs
prng.py              random keys, with a fixed generator
"""
