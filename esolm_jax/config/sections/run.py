"""Fields of the config that belong to no section."""

from esolm_jax.config.checks import SEED, OneOf, between, inside, size
from esolm_jax.config.field import Field
from esolm_jax.family import registry

RUN = {
    "seed": Field(0, "Seed of weights, data order and noise.", SEED),
    "objective": Field("eso_b", "The family member to train.", OneOf(registry.NAMES),
                       fixes_weights=True),
    "alpha_0": Field(0.5, "Fraction of the tokens that diffusion generates.", between(0, 1)),
    "kappa": Field(0.5, "Fraction of a training batch that feeds the diffusion loss.",
                   inside(0, 1)),
    "block_length": Field(4, "Tokens of a block; bd3 only.", size(1)),
    "start_token": Field("bos", "What the first token is predicted from; ar only. none: as bos, "
                         "but the published protocol predicts no first token.",
                         OneOf(("bos", "mask", "none")), fixes_weights=True),
    "low_variance": Field(False, "Train without the ELBO weight; alpha_0 = 1 only."),
    "init_from": Field("", "Workdir, or WORKDIR@STEP, whose EMA weights training starts from; "
                       "'' = random."),
}  # fmt: skip
