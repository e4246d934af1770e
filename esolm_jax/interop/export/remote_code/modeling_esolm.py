"""An Eso-LM in PyTorch: a pre-norm transformer over labelled tokens.

    model = AutoModelForMaskedLM.from_pretrained(FOLDER, trust_remote_code=True)
    logits = model(input_ids).logits            # the mask id where a token is unknown
    text = model.generate(seed=0)               # see generation_esolm.py

Each token has four labels: its id (the mask id where it is to be predicted), its position in the
text, its rank in the order of generation, and whether it is in the context: later tokens do not
read tokens outside of it. `visible` defines which tokens a token reads.
"""

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput

from .configuration_esolm import EsoLMConfig
from .generation_esolm import Generation, KVCache
from .schedule_esolm import UNREAD

TIME_FREQUENCIES = 256  # sinusoids of the time embedding


def visible(q_rank, q_in_context, k_rank, k_in_context):
    """Whether a query reads a key: bool, broadcast from ranks and flags."""
    reads_context = k_rank <= q_rank - (~q_in_context).to(q_rank.dtype)
    reads_copy = ~q_in_context & (k_rank == q_rank)
    return (k_in_context & reads_context) | (~k_in_context & reads_copy)


def rms_normalize(x, epsilon):
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + epsilon)


class RMSNorm(nn.Module):
    """Of queries and keys, over the width of a head."""

    def __init__(self, width, epsilon):
        super().__init__()
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return (rms_normalize(x.float(), self.epsilon) * self.weight).to(x.dtype)


class Norm(nn.Module):
    """LayerNorm or RMSNorm, and adaLN: (n · weight + bias) · (1 + scale) + shift."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        has_bias = config.style == "gpt2"
        self.bias = nn.Parameter(torch.zeros(config.hidden_size)) if has_bias else None

    def forward(self, h, shift, scale):
        x = h.float()
        if self.config.style != "llama":
            x = x - x.mean(dim=-1, keepdim=True)
        x = rms_normalize(x, self.config.norm_eps)
        if self.bias is not None:
            shift = self.bias * (1 + scale) + shift
        return (x * (self.weight * (1 + scale)) + shift).to(h.dtype)


class TimeEmbedding(nn.Module):
    """The embedding of σ = 0, the only noise level that the model is used at: [C]."""

    def __init__(self, config):
        super().__init__()
        self.inner = nn.Linear(TIME_FREQUENCIES, config.cond_width)
        self.outer = nn.Linear(config.cond_width, config.cond_width)

    def forward(self):
        half = TIME_FREQUENCIES // 2
        waves = self.inner.weight.new_ones(TIME_FREQUENCIES)  # cos(0)
        waves[half:] = 0  # sin(0)
        return functional.silu(self.outer(functional.silu(self.inner(waves))))


class Modulation(nn.Module):
    """adaLN: shift, scale, gate, shift, scale, gate; without a time embedding the identity."""

    def __init__(self, config, parts):
        super().__init__()
        self.parts = parts
        wide = parts * config.hidden_size
        self.linear = nn.Linear(config.cond_width, wide) if config.cond_width else None

    def forward(self, condition):
        if self.linear is None:
            return (0.0, 0.0, 1.0, 0.0, 0.0, 1.0)[: self.parts]
        return self.linear(condition).chunk(self.parts)


class Block(nn.Module):
    """Attention and MLP; queries are grouped with the key and the value that they share."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        groups, width = c.num_key_value_heads, c.num_attention_heads * c.head_dim
        per_group = c.num_attention_heads // groups + 2
        self.heads = groups, per_group, c.head_dim
        self.gates = 2 if c.style == "llama" else 1
        bias, out_bias = c.mlp_bias or c.style != "llama", c.out_bias or c.style == "gpt2"
        self.attention_norm = Norm(c)
        self.qkv = nn.Linear(c.hidden_size, groups * per_group * c.head_dim, bias=c.qkv_bias)
        self.attention_out = nn.Linear(width, c.hidden_size, bias=out_bias)
        self.mlp_norm = Norm(c)
        self.mlp_in = nn.Linear(c.hidden_size, self.gates * c.intermediate_size, bias=bias)
        self.mlp_out = nn.Linear(c.intermediate_size, c.hidden_size, bias=bias)
        self.modulation = Modulation(c, 6)
        self.q_norm = RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else None
        self.k_norm = RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else None

    def forward(self, h, condition, angles, mask, cache):
        """h [B, T, D], mask [B, T, S]. `cache`: (keys, values) → those of all S slots."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.modulation(condition)
        qkv = self.qkv(self.attention_norm(h, shift, scale)).unflatten(-1, self.heads)
        q, k, v = qkv.split((self.heads[1] - 2, 1, 1), dim=3)
        q, k, v = q.flatten(2, 3), k[:, :, :, 0], v[:, :, :, 0]  # [B, T, H or G, K]
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, angles), rotate(k, angles)
        h = h + gate * self.attention_out(self.attend(q, *cache(k, v), mask).to(h.dtype))
        inner = self.mlp_in(self.mlp_norm(h, mlp_shift, mlp_scale))
        return h + mlp_gate * self.mlp_out(self.activate(inner))

    def attend(self, q, k, v, mask):
        """Queries [B, T, H, K], keys and values [B, S, G, K], mask [B, T, S] → [B, T, H · K]."""
        shared = self.heads[1] - 2
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        k, v = (part.repeat_interleave(shared, dim=1) for part in (k, v))
        out = functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask[:, None], scale=self.config.score_scale
        )
        return out.transpose(1, 2).flatten(2)

    def activate(self, inner):
        if self.gates == 1:
            return functional.gelu(inner, approximate="tanh")
        gate, up = inner.chunk(2, dim=-1)
        return functional.silu(gate) * up


def rotate(x, angles):
    """RoPE of [B, T, H, K]: the pairs are (i, i + K/2)."""
    if angles is None:
        return x
    cos, sin = angles
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class EsoLMForMaskedLM(Generation, PreTrainedModel):
    """Labelled tokens → logits. generate() is in generation_esolm.py."""

    config_class = EsoLMConfig
    _no_split_modules = ["Block"]
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        places = config.max_positions
        self.positions = nn.Embedding(places, config.hidden_size) if places else None
        self.time = TimeEmbedding(config) if config.cond_width else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.final_norm = Norm(config)
        self.final_modulation = Modulation(config, 2)
        self.logits = nn.Linear(config.hidden_size, config.vocab_size, bias=config.style == "dit")
        self.post_init()

    def get_input_embeddings(self):
        return self.embedding

    def set_input_embeddings(self, value):
        self.embedding = value

    def get_output_embeddings(self):
        return self.logits

    def set_output_embeddings(self, value):
        self.logits = value

    def forward(
        self,
        input_ids,
        attention_mask=None,
        position_ids=None,
        rank=None,
        in_context=None,
        labels=None,
        return_dict=True,
    ):
        """Logits float32 [B, T, V]; the mask token is not excluded.

        With `input_ids` alone, logits[b, i] predict the token at position i of text b, with the
        mask id where a token is unknown: known tokens come first in the order of generation.

        Args:
          attention_mask: [B, T], 0 = padding. With input_ids alone.
          position_ids, rank, in_context: int, int, bool [B, T]; the three other labels, all or
            none. Logits are then in the order of the given tokens.
          labels: [B, T], −100 = without loss. The loss is the mean cross-entropy, and the mask
            token has probability 0.
        """
        explicit = position_ids is not None
        if explicit != (rank is not None) or explicit != (in_context is not None):
            raise ValueError("position_ids, rank and in_context: give all three or none of them")
        if explicit:
            logits = self.run(input_ids, position_ids, rank, in_context.bool())
        else:
            token, order, rank = self.label(input_ids, attention_mask)
            by_rank = self.run(token, order, rank, torch.ones_like(rank, dtype=torch.bool))
            back = order.argsort(dim=1)[..., None].expand_as(by_rank)
            logits = by_rank.gather(1, back)
        loss = None
        if labels is not None:
            allowed = self.without_mask(logits)
            loss = functional.cross_entropy(allowed.flatten(0, 1), labels.flatten())
        if not return_dict:
            return (logits,) if loss is None else (loss, logits)
        return MaskedLMOutput(loss=loss, logits=logits)

    def label(self, input_ids, attention_mask=None):
        """(token, position, rank), int64 [B, T], in the order of generation: known tokens, masks
        from left to right, padding. Where ranks follow from positions, in the order of the text."""
        s = self.config.sampling
        unknown = (input_ids == self.config.mask_token_id).long()
        is_padding = torch.zeros_like(unknown)
        if attention_mask is not None:
            is_padding = (attention_mask == 0).long()
        index = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        order = index
        if s["prefix_of_one_rank"] or (s["cached"] and not s["shift"]):
            order = torch.argsort(torch.maximum(unknown, 2 * is_padding), dim=1, stable=True)
        if s["shift"]:
            start = torch.full_like(input_ids[:, :1], self.config.start_token_id)
            token = torch.cat([start, input_ids[:, :-1]], dim=1)
        else:
            token = input_ids.gather(1, order)
        rank = index // s["rank_block"]
        if s["prefix_of_one_rank"]:
            known = (1 - torch.maximum(unknown, is_padding)).sum(dim=1, keepdim=True)
            rank = torch.where(index < known, 0, rank)
        rank = torch.where(is_padding.gather(1, order).bool(), UNREAD, rank)
        return token, order, rank

    def run(self, token, position, rank, in_context, cache: KVCache | None = None, pick=None):
        """Logits float32 [B, P, V] of labelled tokens [B, T], which also read the cache and are
        written to it. `pick`: int64 [B, P], the tokens to predict; None = all T."""
        k_rank, k_in_context = rank, in_context
        if cache is not None:
            k_rank, k_in_context = cache.labels(rank, in_context)
        mask = visible(
            rank[:, :, None], in_context[:, :, None], k_rank[:, None], k_in_context[:, None]
        )
        h = self.embedding(token)
        if self.positions is None:
            frequency = torch.tensor(self.config.rope_frequencies, device=h.device)
            angle = (position[..., None].float() * frequency)[:, :, None]
            angles = angle.cos(), angle.sin()
        else:
            h, angles = h + self.positions(position), None
        condition = None if self.time is None else self.time()
        for i, block in enumerate(self.blocks):
            h = block(h, condition, angles, mask, _no_cache if cache is None else cache.of_block(i))
        if pick is not None:
            h = h.gather(1, pick[..., None].expand(-1, -1, h.shape[-1]))
        return self.logits(self.final_norm(h, *self.final_modulation(condition))).float()

    def without_mask(self, logits):
        """Logits with −∞ for the mask token."""
        is_mask = torch.arange(logits.shape[-1], device=logits.device) == self.config.mask_token_id
        return logits.masked_fill(is_mask, float("-inf"))


def _no_cache(keys, values):
    return keys, values
