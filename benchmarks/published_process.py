"""The process that runs the published PyTorch code on request: a line of JSON each way."""

import json
import pathlib
import subprocess
import sys

from esolm_jax import config as config_lib
from esolm_jax.errors import UserError

FIELDS = "learning_rate", "b1", "b2", "eps", "weight_decay", "warmup_steps"


def shapes(config, vocab_size: int) -> dict:
    """What published_step.py must know of a config. The published code has a condition in all of
    its models."""
    o, m = config.optimizer, config.model
    return {
        "width": m.width,
        "cond_width": m.cond_width or config_lib.default_config().model.cond_width,
        "blocks": m.blocks,
        "heads": m.heads,
        "dropout": m.dropout,
        "length": config.data.seq_len,
        "batch_size": config.train.batch_size,
        "kappa": config.kappa,
        "vocab_size": vocab_size,
        "ema": o.ema_decay,
        "clip": o.clip_norm,
    } | {field: o[field] for field in FIELDS}


class PublishedProcess:
    """`about` is the answer to the first request."""

    def __init__(self, script: str, directory: str, python: str, request: dict):
        """Runs benchmarks/`script` on the checkout `directory` by the interpreter `python`.

        Raises:
          UserError: the interpreter is missing, or the process ends; here and in `ask`.
        """
        path = pathlib.Path(__file__).with_name(script)
        self.command = [python or sys.executable, "-W", "ignore", str(path), directory]
        pipe = subprocess.PIPE
        try:
            self.process = subprocess.Popen(self.command, stdin=pipe, stdout=pipe, text=True)
        except OSError as error:
            raise UserError(f"--published_python={python}: {error}") from None
        self.about = self.ask(request)

    def ask(self, request: dict) -> dict:
        """The answer to a request."""
        try:
            print(json.dumps(request), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self.process.wait()
            raise UserError(f"`{' '.join(self.command)}` ended with exit code {code}; see above")
        return json.loads(line)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
