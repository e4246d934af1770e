"""Fields of config.sample."""

import functools

from esolm_jax.config.checks import (
    FRACTION,
    MAX_STEPS,
    MAX_TEXTS,
    SEED,
    Check,
    OneOf,
    at_least,
    count,
    size,
)
from esolm_jax.config.field import Field
from esolm_jax.config.sections.evaluation import WEIGHTS

SCHEDULES = [  # made by sampling/plan/schedule.py, which can register more
    "ancestral",
    "strided",
    "shuffled_strided",
    "left_to_right",
    "blockwise",
]
LOOPS = (  # sampling/generate.py
    "auto", "plain", "speculative", "confidence", "llada", "dream", "sdar",
)  # fmt: skip
ORDERS = ("confidence", "random", "margin", "entropy", "left_to_right")
EOS = ("free", "never", "late")
DRAFT_STYLES = ("chain", "staircase")
WEIGHT_DTYPES = ("auto", "int8")  # 8-bit ones are those of sampling/engine/quantize.py
CACHE_DTYPES = ("auto", "int8", "float8_e4m3fn")

_field = functools.partial(Field, may_change_on_resume=True)

SAMPLE = {
    "num_texts": _field(8, "Number of texts; of each prompt if there are any.",
                        at_least(1, MAX_TEXTS), formerly=("num",)),
    "length": _field(0, "Tokens of a text, prompt included; 0 = data.seq_len.", size(0)),
    "schedule": _field("ancestral", "Order in which positions are generated.", OneOf(SCHEDULES),
                       former_values={"confidence": {"sample.schedule": "ancestral",
                                                     "sample.loop": "confidence"}}),
    "steps": _field(0, "Steps T, with loop sdar of a block; 0 = one token per step.",
                    at_least(0, MAX_STEPS)),
    "block_length": _field(0, "Schedule blockwise: tokens of a block; 0 = data.seq_len, or bd3's "
                           "config.block_length. Loop llada: behind the prompt; 0 = one block.",
                           size(0), formerly=("block",)),
    "loop": _field("auto", "plain follows the schedule. speculative (eso_b) yields several tokens "
                   "per pass from the distribution of one. confidence (eso_b, mdlm) generates the "
                   "most confident tokens first. llada, dream, sdar: as the published code of "
                   "these models. auto = speculative if draft_tokens is set, else plain.",
                   OneOf(LOOPS), before="auto"),
    "draft_tokens": _field(0, "Loop speculative: tokens that a pass may yield; 0 = 4.",
                           Check(lambda v: v == 0 or 2 <= v <= 64, "0 or in [2, 64]"),
                           formerly=("speculate",)),
    "draft_style": _field("chain", "Loop speculative: how tokens are drafted.",
                          OneOf(DRAFT_STYLES), formerly=("speculate_style",)),
    "draft_adaptive": _field(False, "Loop speculative: makes draft_tokens an upper bound.",
                             formerly=("speculate_adaptive",)),
    "tokens_per_pass": _field(1, "Loop confidence: tokens per pass, at most.", size(1),
                              formerly=("confident",)),
    "confidence_threshold": _field(0.0, "Loops confidence, sdar: least probability of a token; 0 = "
                                   "none.", FRACTION, formerly=("threshold",)),
    "order": _field("confidence", "Loops llada, dream, sdar: the masks that a pass reveals first.",
                    OneOf(ORDERS), before="confidence"),
    "order_temperature": _field(0.0, "Loop dream: temperature of the choice of the masks; 0 = the "
                                "first ones in the order.", at_least(0), before=0.0),
    "guidance": _field(0.0, "Loop llada: strength of classifier-free guidance, against a pass that "
                       "does not see the prompt.", at_least(0), before=0.0),
    "eos": _field("free", "Loop llada: EOS is drawn like other tokens, never, or revealed late (it "
                  "has no confidence; EOT, too).", OneOf(EOS), before="free"),
    "stop_at_eos": _field(False, "Ends a text at its first generated EOS after all known tokens."),
    "temperature": _field(1.0, "Temperature of the draws; 0 = greedy.", at_least(0)),
    "top_p": _field(1.0, "Probability mass of nucleus sampling; 1 = off.",
                   Check(lambda v: 0 < v <= 1, "in (0, 1]")),
    "top_k": _field(0, "Number of most probable tokens to draw from; 0 = all.", count(0)),
    "seed": _field(0, "Seed of the draws.", SEED),
    "weight_dtype": _field("auto", "Type of the weights; auto = model.dtype. int8 has a scale for "
                           "each output channel.", OneOf(WEIGHT_DTYPES), before="auto"),
    "cache_dtype": _field("auto", "Type of the KV cache; auto = model.dtype. 8 bits have a scale "
                          "for each token and head.", OneOf(CACHE_DTYPES), before="auto"),
    "weights": _field("ema", "Which weights to sample from.", OneOf(WEIGHTS)),
}  # fmt: skip
