"""The config of a run: every field declared once, in the table of its section.

    sections/      the fields: default, one line of documentation, allowed values (field.py)
    checks.py      checks of one value
    schema.py      all fields; default_config(), from which a config file starts
    validation.py  checks of a whole config
    saved.py       configs in checkpoints, of this version of the schema and of earlier ones
    renames.py     earlier names and values of fields
    command_line.py  overrides on the command line, with earlier names and values
    removed.py     fields that no longer exist
    page.py        docs/config.md
    overrides.py   a config with some fields set to other values

Imports no JAX. To add a field, add one line to its section; if earlier checkpoints lack it, it
needs `before`. To rename a field, use `formerly`; to rename a value,
`former_values`.
"""

from esolm_jax.config.command_line import with_current_overrides
from esolm_jax.config.overrides import Setting, overridden
from esolm_jax.config.renames import begin_command
from esolm_jax.config.saved import from_saved, to_saved
from esolm_jax.config.schema import default_config, fields, flat, is_allowed, names_with
from esolm_jax.config.sections.evaluation import METRICS
from esolm_jax.config.sections.sampling import DRAFT_STYLES, SCHEDULES
from esolm_jax.config.validation import (
    validate,
    validate_evaluation,
    validate_mesh,
    validate_training,
)

__all__ = [
    "DRAFT_STYLES",
    "METRICS",
    "SCHEDULES",
    "Setting",
    "begin_command",
    "default_config",
    "fields",
    "flat",
    "from_saved",
    "is_allowed",
    "names_with",
    "overridden",
    "to_saved",
    "validate",
    "validate_evaluation",
    "validate_mesh",
    "validate_training",
    "with_current_overrides",
]
