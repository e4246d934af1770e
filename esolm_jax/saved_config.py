"""The config saved with a checkpoint, as a config file of its own: saved_config.py:WORKDIR.

This is what `evaluate` and `sample` run with when --config is left out, so overrides such as
--config.alpha_0=0.25 apply to the config that the model was trained with.
"""

from esolm_jax import checkpoint


def get_config(workdir: str):
    """ConfigDict of the latest checkpoint in WORKDIR, locked."""
    return checkpoint.saved_config(workdir)
