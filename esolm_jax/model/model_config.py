"""Sizes and policies of a transformer."""

import dataclasses

TIME_FREQUENCIES = 256  # sinusoids of the time embedding
# All products and the statistics of norms: no product is computed again. That of mlp_out is needed
# for the gradient of its gate.
_PRODUCTS = ("qkv", "attention", "attention_out", "mlp_in", "mlp_out", "norm")
REMAT = {  # policy → names of the activations of a block that are kept for the backward pass
    "none": None,  # all of them
    # What products read, too: neither a norm's result nor GELU's is computed again.
    "operands": (*_PRODUCTS, "operand", "residual"),
    "matmuls": _PRODUCTS,
    "attention": ("attention",),
    "full": (),
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A transformer's sizes and policies.

    Attributes:
      vocab_size: V, the mask token included.
      width, blocks, heads: D, N, H.
      cond_width: C, width of the time embedding behind adaLN; 0 = no adaLN (AR).
      dropout: rate, applied after attention and MLP, in training only.
      dropout_bits: the generator of its masks, one of prng.GENERATORS.
      dtype: compute dtype; parameters, norms, softmax and logits are float32.
      unroll: blocks per iteration of the scan over blocks: more is slower to compile, and faster:
        a scan copies what it keeps for the backward pass, and a loop of one iteration is no loop.
      style: "dit", "gpt2" or "llama".
      kv_heads: G, heads of keys and values, a divisor of H; 0 = H.
      mlp_width: F; 0 = 4·D.
      attention_width: H·K, a multiple of 2·H; 0 = D.
      norm_eps: ε under the square root of norms.
      qkv_bias: whether queries, keys and values have biases (Qwen 2, GPT-2).
      out_bias, mlp_bias: style "llama": whether the attention's output and the MLP have biases.
      qk_norm: whether each query and key is RMS-normed, over K (Qwen 3).
      max_positions: > 0 = a learned embedding of that many positions in place of RoPE (GPT-2).
      rope_base: base of the angles position · base^(−2i/K).
      rope_factor, rope_original_length, rope_scaling, rope_low, rope_high: > 1 = low frequencies
        are divided by the factor; see rope_frequencies.
      rope_attention_factor: rotated queries and keys are multiplied by it (yarn).
      attention: the implementation, one of attention.KINDS.
      remat: the rematerialization policy, one of REMAT.
    """

    vocab_size: int
    width: int
    blocks: int
    heads: int
    cond_width: int
    dropout: float = 0.0
    dropout_bits: str = "threefry2x32"
    dtype: str = "float32"
    unroll: int = 1
    style: str = "dit"
    kv_heads: int = 0
    mlp_width: int = 0
    attention_width: int = 0
    norm_eps: float = 1e-5
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    max_positions: int = 0
    rope_base: float = 10_000.0
    rope_factor: float = 1.0
    rope_original_length: int = 8192
    rope_scaling: str = "llama3"
    rope_low: float = 1.0
    rope_high: float = 4.0
    rope_attention_factor: float = 1.0
    attention: str = "chunked"
    remat: str = "none"

    @property
    def groups(self) -> int:
        """G: heads of keys and values."""
        return self.kv_heads or self.heads

    @property
    def head_width(self) -> int:
        """K."""
        return (self.attention_width or self.width) // self.heads

    @property
    def score_scale(self) -> float:
        """The factor of q · k before the softmax."""
        return self.rope_attention_factor**2 * self.head_width**-0.5

    @property
    def inner(self) -> int:
        """F: inner width of the MLP."""
        return self.mlp_width or 4 * self.width
