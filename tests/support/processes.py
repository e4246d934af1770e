"""A script run by several processes that meet."""

import os
import pathlib
import socket
import subprocess
import sys
import textwrap
import time

from esolm_jax.parallel import launcher

ROOT = str(pathlib.Path(__file__).parents[2])

# What all scripts begin with; a UserError outside guard() ends as it does in the command line.
PREAMBLE = """
import os, signal, sys, time
from esolm_jax.parallel import distributed, multihost
from esolm_jax.parallel.guard import guard
from esolm_jax.parallel.stop_signal import StopSignal
from esolm_jax.errors import UserError

def main(body, **settings):
    settings = dict(init_timeout=120, heartbeat_timeout=60, barrier_timeout=60) | settings
    try:
        with guard():
            distributed.start(**settings)
            body(distributed.process_index())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)

def train(stop=None, steps=500, at_step=lambda step: None):
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec
    mesh = Mesh(np.array(jax.devices()), ("data",))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    x = jax.make_array_from_callback((mesh.size,), rows, lambda index: np.ones(1, np.float32))
    total = jax.jit(jnp.sum, out_shardings=NamedSharding(mesh, PartitionSpec()))
    for step in range(1, steps + 1):
        assert float(total(x)) == jax.process_count()
        at_step(step)
        if stop and (number := stop.after(step)):
            print("stopped after", step, number, flush=True)
            sys.exit(128 + number)
        time.sleep(0.02)
"""


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Processes:
    """The script, run by as many processes as there are `indices`, told to be so many."""

    def __init__(
        self, script, *, count=2, indices=None, host="127.0.0.1", port=None, **environment
    ):
        address = f"{host}:{port or free_port()}"
        hidden = ("XLA_FLAGS", *launcher.ENV_VARS)
        base = {k: v for k, v in os.environ.items() if k not in hidden}
        base |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": ROOT, "JAX_NUM_PROCESSES": str(count)}
        self.address, self.begin = address, time.time()
        self.all = [
            subprocess.Popen(
                [sys.executable, "-u", "-c", PREAMBLE + textwrap.dedent(script)],
                env=base
                | {"JAX_COORDINATOR_ADDRESS": address, "JAX_PROCESS_ID": str(index)}
                | environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for index in (range(count) if indices is None else indices)
        ]

    def wait(self):
        """[(exit code, stdout, stderr)] of all of them."""
        try:
            texts = [process.communicate(timeout=150) for process in self.all]
        finally:
            for process in self.all:
                process.kill()
        return [(p.returncode, *text) for p, text in zip(self.all, texts, strict=True)]
