"""Fields of config.optimizer and config.train."""

from esolm_jax.config.checks import (
    EPSILON,
    FRACTION,
    STEP_RANGE,
    ListOf,
    OneOf,
    above,
    at_least,
    count,
    size,
)
from esolm_jax.config.field import Field
from esolm_jax.config.sections.evaluation import METRICS

LR_SCHEDULES = ("constant", "cosine")
ON_NON_FINITE = ("stop", "skip")

_FREE = {"may_change_on_resume": True}

OPTIMIZER = {
    "learning_rate": Field(3e-4, "Peak learning rate of AdamW.", above(0)),
    "b1": Field(0.9, "Decay of the first moment.", FRACTION),
    "b2": Field(0.999, "Decay of the second moment.", FRACTION),
    "eps": Field(1e-8, "Epsilon of AdamW.", EPSILON),
    "weight_decay": Field(0.0, "Decoupled weight decay.", at_least(0)),
    "clip_norm": Field(1.0, "Largest global norm of the gradient.", above(0), formerly=("clip",)),
    "warmup_steps": Field(2500, "Steps of linear warm-up.", count(0)),
    "schedule": Field("constant", "Learning rate after warm-up.", OneOf(LR_SCHEDULES)),
    "ema_decay": Field(
        0.9999,
        "Decay of the exponential moving average of the weights.",
        FRACTION,
        formerly=("ema",),
    ),
}

TRAIN = {
    "batch_size": Field(512, "Windows per step, over all devices.", size(1)),
    "grad_accumulation": Field(1, "Micro-batches per step.", size(1),
                               formerly=("accumulation",)),
    "steps": Field(1_000_000, "Steps of training.", count(1), **_FREE),
    "anneal_steps": Field(0, "Steps over which alpha_0 rises from 0 to its value; eso_a, eso_b.",
                          count(0)),
    "log_every": Field(100, "Steps between two lines of metrics.jsonl.", count(1), **_FREE),
    "eval_every": Field(5000, "Steps between two NELBOs on part of the validation split.",
                        count(1), **_FREE),
    "eval_windows": Field(512, "Windows of that part; 0 = all.", count(0), **_FREE),
    "metrics": Field("nelbo", "Metrics on that part, comma-separated.", ListOf(METRICS, "nelbo"),
                     before="nelbo", **_FREE),
    "checkpoint_every": Field(5000, "Steps between two checkpoints.", count(1), **_FREE),
    "keep_last": Field(2, "Newest checkpoints to keep.", count(1), **_FREE),
    "keep_best": Field(1, "Checkpoints to keep that have the lowest validation NELBO.", count(0),
                       **_FREE),
    "on_non_finite": Field("stop", "What to do at a NaN or infinite loss, gradient or weight.",
                           OneOf(ON_NON_FINITE), before="stop", **_FREE),
    "profile_steps": Field("", "Steps whose XLA profile is written to WORKDIR/profile; '' = none.",
                           STEP_RANGE, before="", **_FREE),
    "time_limit": Field(0.0, "Minutes from the start of the process until it has ended, with "
                        "a checkpoint; 0 = no limit.", at_least(0), before=0.0, **_FREE),
}  # fmt: skip
