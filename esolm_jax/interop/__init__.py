"""Weights in and out: other implementations' checkpoints, other runtimes."""
