"""The families by name. A new family is one file and one entry here (or one call of `register`)."""

from esolm_jax.errors import UserError, nearest
from esolm_jax.family import ar, bd3, eso_a, eso_b, mdlm
from esolm_jax.family.family import Family
from esolm_jax.family.phase import Phase, PhaseSettings, Special

_FAMILIES: dict[str, Family] = {
    module.FAMILY.name: module.FAMILY for module in (ar, mdlm, bd3, eso_a, eso_b)
}


def register(family: Family) -> Family:
    """Adds a family; config.objective can then name it. ValueError if the name is taken."""
    if family.name in _FAMILIES:
        raise ValueError(f"family {family.name!r}: is registered already")
    _FAMILIES[family.name] = family
    return family


def unregister(name: str) -> None:
    """Removes a family, such as one of a test."""
    del _FAMILIES[name]


def names() -> tuple[str, ...]:
    """All allowed values of config.objective."""
    return tuple(_FAMILIES)


def get(name: str) -> Family:
    """The family of config.objective. UserError: there is none of this name."""
    if name not in _FAMILIES:
        raise UserError(
            f"config.objective={name!r}: must be one of {', '.join(_FAMILIES)}"
            f"{nearest(name, _FAMILIES)}"
        )
    return _FAMILIES[name]


def phases(config, special: Special, *, low_variance: bool, alpha_0=None) -> tuple[Phase, ...]:
    """The phases of `config.objective`, without those that have no share of the batch.

    Reads objective, alpha_0, kappa, block_length and data.seq_len. `low_variance` drops the ELBO
    weight of the diffusion phase (training only).

    `alpha_0`, a traced scalar, replaces the config's α₀ while that is annealed; shapes and shares
    of the batch stay those of the config's. At 0 the diffusion loss has weight 0.
    """
    settings = PhaseSettings(
        special=special,
        alpha_0=config.alpha_0,
        noise_alpha_0=config.alpha_0 if alpha_0 is None else alpha_0,
        kappa=config.kappa,
        seq_len=config.data.seq_len,
        block_length=config.block_length,
        low_variance=low_variance,
    )
    return get(config.objective).phases(settings)


def is_exact(config) -> bool:
    """Whether the NELBO is the likelihood itself: at α₀ = 0 no mask and no order is random."""
    return config.alpha_0 == 0
