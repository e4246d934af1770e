"""Fields of config.model."""

from esolm_jax.attention import kinds
from esolm_jax.config.checks import (
    EPSILON,
    FRACTION,
    MAX_BLOCKS,
    MAX_UNROLL,
    OneOf,
    above,
    at_least,
    count,
    size,
    width,
)
from esolm_jax.config.field import Field

STYLES = ("dit", "gpt2", "llama")
DTYPES = ("float32", "bfloat16")
ROPE_SCALINGS = ("llama3", "linear", "yarn")  # see model/rope.py
REMAT = ("none", "operands", "matmuls", "attention", "full")  # see model/model_config.py

_SIZE = {"fixes_weights": True}
_FREE = {"may_change_on_resume": True}

MODEL = {
    "width": Field(256, "Width D of the residual stream.", width(2), **_SIZE),
    "blocks": Field(4, "Number N of blocks.", at_least(1, MAX_BLOCKS), **_SIZE),
    "heads": Field(8, "Number H of query heads.", width(1), **_SIZE),
    "cond_width": Field(128, "Width C of the time embedding for adaLN; 0 = no adaLN.", width(0),
                        **_SIZE),
    "dropout": Field(0.1, "Dropout rate after attention and MLP.", FRACTION),
    "dropout_bits": Field("auto", "Generator of dropout: auto = threefry2x32 on a CPU, "
                          "else mix32, a cheap hash.", OneOf(("auto", "threefry2x32", "mix32")),
                          before="threefry2x32", **_FREE),
    "dtype": Field("float32", "Compute dtype; weights are always float32.", OneOf(DTYPES)),
    "style": Field("dit", "dit: LayerNorm, GELU, biases in the MLP. gpt2: biases also in norms "
                   "and after attention. llama: RMSNorm, SwiGLU, no biases.", OneOf(STYLES),
                   **_SIZE),
    "kv_heads": Field(0, "Number G of key/value heads; 0 = heads.", width(0), **_SIZE),
    "mlp_width": Field(0, "Inner width F of the MLP; 0 = 4 x width.", width(0), **_SIZE),
    "attention_width": Field(0, "Heads x width of a head; 0 = width.", width(0), **_SIZE),
    "norm_eps": Field(1e-5, "Epsilon of the norms.", EPSILON, **_SIZE),
    "qkv_bias": Field(False, "Biases of queries, keys and values.", **_SIZE),
    "out_bias": Field(False, "Style llama: a bias after attention.", before=False, **_SIZE),
    "mlp_bias": Field(False, "Style llama: biases in the MLP.", before=False, **_SIZE),
    "qk_norm": Field(False, "An RMSNorm of each query and key.", **_SIZE),
    "max_positions": Field(0, "Number of learned positions; 0 = RoPE.", size(0),
                           formerly=("positions",), **_SIZE),
    "rope_base": Field(10_000.0, "Base of the RoPE frequencies.", above(1), **_SIZE),
    "rope_factor": Field(1.0, "Divides RoPE frequencies, as rope_scaling says; 1 = none.",
                         at_least(1), **_SIZE),
    "rope_original_length": Field(8192, "Text length before RoPE scaling.", count(1),
                                  formerly=("rope_length",), **_SIZE),
    "rope_scaling": Field("llama3", "Which frequencies: linear = all; llama3, yarn = the low ones.",
                          OneOf(ROPE_SCALINGS), before="llama3", **_SIZE),
    "rope_low": Field(1.0, "Waves per rope_original_length up to which frequencies are divided.",
                      above(0), before=1.0, **_SIZE),
    "rope_high": Field(4.0, "Waves per rope_original_length from which they are kept.",
                       above(0), before=4.0, **_SIZE),
    "rope_attention_factor": Field(1.0, "Factor of rotated queries and of keys (yarn).",
                                   above(0), before=1.0, **_SIZE),
    "attention": Field("auto", "Implementation: auto = flash on a GPU, splash on a TPU if L > 128, "
                       "else chunked. cudnn, in bfloat16, is for ar, mdlm, mdlm_shifted and the "
                       "diffusion phase of eso_b, if mesh.sequence is 1; flash computes the rest.",
                       OneOf(("auto", *kinds.KINDS)),
                       former_values={"lean": {"model.attention": "chunked"}}, **_FREE),
    "remat": Field("none", "What the backward pass recomputes. none, operands, matmuls: no matrix "
                   "product (operands moves fewest bytes on a GPU, matmuls keeps less); attention: "
                   "all but attention; full: all.", OneOf(REMAT), **_FREE),
    "loss_chunk": Field(0, "Tokens that a device projects on the vocabulary at a time; 0 = 512 on "
                        "CPUs, elsewhere an eighth of all, as memory allows.", count(0), **_FREE),
    "unroll": Field(0, "Blocks per iteration of the scan over blocks; 0 = all on GPUs, unless "
                    "remat is none and fsdp above 1.", at_least(0, MAX_UNROLL), **_FREE),
}  # fmt: skip
