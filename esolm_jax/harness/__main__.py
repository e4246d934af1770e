"""The command line of lm_eval with the model "esolm", in one or in several processes.

python -m esolm_jax.harness --model esolm --model_args workdir=DIR --tasks hellaswag

Started by a launcher, all processes run the same tasks, each forward pass on the devices of all of
them. Process 0 prints and writes.
"""

import os
import sys

from esolm_jax import cli
from esolm_jax import config as config_lib
from esolm_jax.errors import UserError
from esolm_jax.parallel import distributed, guard
from esolm_jax.process import jax_settings

_RANK = "LOCAL_RANK"  # lm_eval: only the process of rank 0 has results to write


def _evaluate() -> None:
    """Raises UserError: lm_eval does not know a task."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except ValueError as error:
        if not str(error).startswith("Tasks not found"):
            raise
        raise UserError(str(error)) from error


def main() -> int:
    """The exit code: 2 for bad input, which is one line."""
    try:
        from esolm_jax.harness import adapter  # noqa: F401  (registers the model)
    except ImportError as error:
        print(f"error: {error}: pip install -e '.[lm-eval]'", file=sys.stderr)
        return 2
    try:
        with jax_settings.pinned(), guard.guard():
            cli.join(config_lib.default_config())
            if distributed.is_started():
                os.environ[_RANK] = str(distributed.process_index())
            with cli.only_process_0_prints():
                _evaluate()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
