"""The config saved with a checkpoint, as a config file: saved_config.py:WORKDIR.

`evaluate` and `sample` use it when --config is left out, so overrides such as
--config.alpha_0=0.25 apply to the config of the training run. WORKDIR@STEP names one of
its checkpoints: a number, best or latest.
"""

from esolm_jax.training import checkpoint_meta, checkpoint_steps


def get_config(workdir: str):
    """ConfigDict of a checkpoint in WORKDIR, locked; by default of the latest."""
    return checkpoint_meta.config_of_command(*checkpoint_steps.split_source(workdir))
