"""python -m esolm_jax.harness …: the command line of lm_eval, which then has the model "esolm".

python -m esolm_jax.harness --model esolm --model_args workdir=DIR --tasks hellaswag
"""

import sys

from esolm_jax.errors import UserError


def main() -> int:
    """The exit code: 2 for bad input, which is one line."""
    try:
        from lm_eval.__main__ import cli_evaluate

        from esolm_jax.harness import adapter  # noqa: F401  (registers the model)
    except ImportError as error:
        print(f"error: {error}: pip install -e '.[lm-eval]'", file=sys.stderr)
        return 2
    try:
        cli_evaluate()
    except (UserError, ValueError) as error:
        if not isinstance(error, UserError) and not str(error).startswith("Tasks not found"):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
