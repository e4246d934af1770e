"""The configuration of an Eso-LM: config.json of this folder."""

from transformers import PretrainedConfig


class EsoLMConfig(PretrainedConfig):
    """Sizes of the network and settings of generation.

    Attributes:
      vocab_size: V, the mask token included. hidden_size, num_hidden_layers, num_attention_heads,
        num_key_value_heads, head_dim, intermediate_size: D, N, H, G, K, F.
      style: "dit", "gpt2" (LayerNorm, GELU) or "llama" (RMSNorm, SwiGLU).
      cond_width: width of the time embedding behind adaLN; 0 = no adaLN.
      norm_eps: ε of norms. qkv_bias, qk_norm: biases of queries, keys and values; norms of queries
        and keys. out_bias, mlp_bias: of style "llama".
      max_positions: number of learned positions; 0 = RoPE.
      rope_frequencies: K/2 numbers; an angle is position · frequency.
      score_scale: factor of q · k before the softmax; by default 1/√K.
      mask_token_id: stands for a token to be predicted; never predicted itself.
      start_token_id: precedes the text of an autoregressive model.
      sampling: defaults of generate(), and how the family labels tokens (generation_esolm.py).
      esolm: the origin: training config, tokenizer, step; read by `esolm_jax.convert`.
    """

    model_type = "esolm"

    def __init__(
        self,
        vocab_size=260,
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=None,
        head_dim=None,
        intermediate_size=None,
        style="dit",
        cond_width=0,
        norm_eps=1e-5,
        qkv_bias=False,
        out_bias=False,
        mlp_bias=False,
        qk_norm=False,
        max_positions=0,
        rope_frequencies=(),
        score_scale=None,
        mask_token_id=None,
        start_token_id=None,
        sampling=None,
        esolm=None,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.intermediate_size = intermediate_size or 4 * hidden_size
        self.style = style
        self.cond_width = cond_width
        self.norm_eps = norm_eps
        self.qkv_bias = qkv_bias
        self.out_bias = out_bias
        self.mlp_bias = mlp_bias
        self.qk_norm = qk_norm
        self.max_positions = max_positions
        self.rope_frequencies = list(rope_frequencies)
        self.score_scale = score_scale or self.head_dim**-0.5
        self.mask_token_id = vocab_size - 1 if mask_token_id is None else mask_token_id
        self.start_token_id = start_token_id
        self.sampling = sampling or {}
        self.esolm = esolm or {}
        kwargs.setdefault("tie_word_embeddings", False)
        super().__init__(**kwargs)
