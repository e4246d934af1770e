"""The schema: all fields, and the config of their defaults."""

from collections.abc import Mapping

from ml_collections import ConfigDict

from esolm_jax.config import checks
from esolm_jax.config.field import Field, Value
from esolm_jax.config.renames import Section, earlier_names
from esolm_jax.config.sections.data import DATA
from esolm_jax.config.sections.devices import DISTRIBUTED, MESH
from esolm_jax.config.sections.evaluation import EVAL
from esolm_jax.config.sections.model import MODEL
from esolm_jax.config.sections.run import RUN
from esolm_jax.config.sections.sampling import SAMPLE
from esolm_jax.config.sections.training import OPTIMIZER, TRAIN

VERSION = 2  # version of saved configs; 1 is commit 947f88e, which saved no version
SECTIONS: dict[str, dict[str, Field]] = {
    "": RUN,
    "data": DATA,
    "model": MODEL,
    "mesh": MESH,
    "distributed": DISTRIBUTED,
    "optimizer": OPTIMIZER,
    "train": TRAIN,
    "eval": EVAL,
    "sample": SAMPLE,
}


def fields() -> dict[str, Field]:
    """Every field by its dotted name, such as "data.seq_len"."""
    return {
        f"{section}.{name}" if section else name: field
        for section, table in SECTIONS.items()
        for name, field in table.items()
    }


def names_with(attribute: str) -> tuple[str, ...]:
    """Dotted names of the fields for which an attribute of Field is true."""
    return tuple(name for name, field in fields().items() if getattr(field, attribute))


def renamed() -> dict[str, str]:
    """Earlier dotted name → name, of all fields."""
    return {
        f"{section}.{old}" if section else old: f"{section}.{new}" if section else new
        for section, table in SECTIONS.items()
        for old, new in earlier_names(table).items()
    }


def default_config() -> ConfigDict:
    """Every field with its default, locked. A config file starts from this."""
    return config_of({name: field.default for name, field in fields().items()})


def config_of(values: Mapping[str, Value]) -> ConfigDict:
    """The config with these values of all fields, by dotted name, locked."""
    config = Section.of("", SECTIONS[""])
    for name, table in SECTIONS.items():
        section = Section.of(name, table) if name else config
        for key in table:
            section[key] = values[f"{name}.{key}" if name else key]
        if name:
            config[name] = section
    return config.lock()


def flat(config: Mapping | ConfigDict) -> dict:
    """Fields by dotted name: {"data.seq_len": 128, …}."""
    values = {}
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            values |= {f"{name}.{inner}": v for inner, v in flat(value).items()}
        else:
            values[name] = value
    return values


def is_allowed(name: str, value) -> bool:
    """Whether the field of this dotted name may have the value, by itself; of the right type."""
    check = fields()[name].check
    return check is None or not checks.problem(check, value)
