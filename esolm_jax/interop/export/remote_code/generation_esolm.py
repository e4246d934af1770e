"""Two-phase generation with a KV cache: a diffusion phase that generates several tokens per pass in
random order, then a sequential phase from left to right.

The orders, step sizes and draws of a seed are those of `python -m esolm_jax.sample`: row b of a
batch depends on (seed, b) and its prompt only.
"""

import dataclasses

import numpy as np
import torch

from .schedule_esolm import UNREAD, check_passes, checked, plan_passes

BITS = 0xFFFFFFFF
ROTATIONS = (13, 15, 26, 6), (17, 29, 16, 24)
SMALL_TEMPERATURE, TEMPERATURES = 1e-2, (1e-30, 1e30)


# Draws: JAX's generator, Threefry-2x32.


def threefry(key, counter):
    """int64 [..., 2] of 32-bit numbers, from a key and a counter of broadcastable shapes."""
    (k0, k1), (a, b) = key.unbind(-1), counter.unbind(-1)
    keys = k0, k1, k0 ^ k1 ^ 0x1BD11BDA
    a, b = (a + k0) & BITS, (b + k1) & BITS
    for i in range(5):
        for rotation in ROTATIONS[i % 2]:
            a = (a + b) & BITS
            b = a ^ (((b << rotation) | (b >> (32 - rotation))) & BITS)
        a = (a + keys[(i + 1) % 3]) & BITS
        b = (b + keys[(i + 2) % 3] + i + 1) & BITS
    return torch.stack(torch.broadcast_tensors(a, b), dim=-1)


def fold_in(key, number):
    """The key [..., 2] of a key and a number below 2**32."""
    return threefry(key, torch.stack([torch.zeros_like(number), number], dim=-1))


def gumbel(keys, vocab_size):
    """Standard Gumbel noise float32 [..., V], exact in the upper tail."""
    index = torch.arange(2 * vocab_size, device=keys.device)
    bits = threefry(keys[..., None, :], torch.stack([torch.zeros_like(index), index], dim=-1))
    uniform = ((bits[..., 0] ^ bits[..., 1]) >> 9).to(torch.float32) * 2.0**-23
    high, low = uniform.chunk(2, dim=-1)
    fine = high + low * 2.0**-23 + torch.finfo(torch.float32).tiny
    return -torch.log(-torch.log1p(-torch.where(high >= 0.5, high, fine)))


@dataclasses.dataclass(frozen=True)
class Sampler:
    """argmax(filter(logits / temperature) + Gumbel noise). temperature 0 = greedy; top_k 0 = off,
    applied before top_p; top_p 1 = off. keys: int64 [B, 2], one per row."""

    temperature: float
    top_k: int
    top_p: float
    keys: torch.Tensor

    def __call__(self, logits, position):
        """int64 [B, P] from logits [B, P, V], −∞ at the mask, for positions [B, P]."""
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        noise = gumbel(fold_in(self.keys[:, None], position), logits.shape[-1])
        return (self.filtered(logits) + noise).argmax(dim=-1)

    def filtered(self, logits):
        temperature = min(max(self.temperature, TEMPERATURES[0]), TEMPERATURES[1])
        if temperature < SMALL_TEMPERATURE:  # the logits would overflow
            logits = logits - logits.amax(dim=-1, keepdim=True)
        logits = logits / temperature
        if self.top_k:
            kth = logits.topk(min(self.top_k, logits.shape[-1]), dim=-1).values[..., -1:]
            logits = logits.masked_fill(logits < kth, float("-inf"))
        if self.top_p < 1:
            probs = logits.softmax(dim=-1)
            falling = probs.sort(dim=-1, descending=True).values
            before = falling.cumsum(dim=-1) - falling
            last = (before < self.top_p).sum(dim=-1, keepdim=True).clamp(min=1) - 1
            logits = logits.masked_fill(probs < falling.gather(-1, last), float("-inf"))
        return logits


class KVCache:
    """Keys and values by slot. `window(start, width)` says where the next tokens go."""

    def __init__(self, config, batch, slots, like):
        shape = (batch, slots, config.num_key_value_heads, config.head_dim)
        self.keys = [like.new_zeros(shape) for _ in range(config.num_hidden_layers)]
        self.values = [like.new_zeros(shape) for _ in range(config.num_hidden_layers)]

    def window(self, start, width):
        """start: int64 [B]; slots below it are read by all tokens of the pass."""
        self.start, self.stop = start, int(start.max()) + width
        self.slots = start[:, None] + torch.arange(width, device=start.device)
        self.rows = torch.arange(len(start), device=start.device)[:, None]

    def labels(self, rank, in_context):
        """Ranks and flags [B, S] of all slots."""
        slot = torch.arange(self.stop, device=rank.device)[None]
        ranks = torch.where(slot < self.start[:, None], -1, UNREAD)
        flags = torch.ones_like(ranks, dtype=torch.bool)
        return ranks.scatter(1, self.slots, rank), flags.scatter(1, self.slots, in_context)

    def of_block(self, i):
        """A function that writes keys and values [B, T, G, K] and returns those of all slots."""

        def write(keys, values):
            self.keys[i][self.rows, self.slots] = keys
            self.values[i][self.rows, self.slots] = values
            return self.keys[i][:, : self.stop], self.values[i][:, : self.stop]

        return write


class Generation:
    """generate() of an Eso-LM."""

    @torch.no_grad()
    def generate(self, input_ids=None, *, num_texts=1, length=None, seed=0, **settings):
        """Token ids int64 [B, L].

        Args:
          input_ids: [B, n], prompts, with the mask id where a token is to be generated; L − n masks
            follow. None: `num_texts` texts without a prompt.
          length: L, by default that of the config.
          seed: row b is drawn from (seed, b).
          settings: alpha_0, schedule, steps, block_length, temperature, top_k, top_p; by default
            those of config.sampling.
        """
        config = self.config
        s = checked(config.sampling, settings, length)
        length, device = s["length"], self.embedding.weight.device
        if input_ids is None:
            input_ids = torch.zeros((num_texts, 0), dtype=torch.int64)
        if input_ids.shape[1] > length:
            raise ValueError(f"input_ids: {input_ids.shape[1]} tokens: more than length={length}")
        rows = np.full((len(input_ids), length), config.mask_token_id, np.int64)
        rows[:, : input_ids.shape[1]] = input_ids.cpu().numpy()
        passes = plan_passes(s, rows != config.mask_token_id, seed)
        check_passes(s, passes)
        key = torch.tensor([[0, seed]], device=device)
        keys = fold_in(key, torch.arange(len(rows), device=device))
        sampler = Sampler(s["temperature"], s["top_k"], s["top_p"], keys)
        known = np.take_along_axis(rows, passes.order, axis=1)
        known = self._run_passes(s, passes, torch.tensor(known, device=device), sampler)
        return torch.zeros_like(known).scatter(1, torch.tensor(passes.order).to(device), known)

    def _run_passes(self, s, passes, known, sampler):
        """Tokens by rank, int64 [B, L], from the known ones (masks elsewhere)."""
        batch, length = known.shape
        shift, widths = s["shift"], (passes.end - passes.start).max(axis=1, initial=1)
        slots, device = length + int(widths.max(initial=1)), known.device
        mask_id = self.config.mask_token_id
        known = torch.nn.functional.pad(known, (shift, slots - length), value=mask_id)
        if shift:
            known[:, 0] = self.config.start_token_id
        order = torch.tensor(np.pad(passes.order, ((0, 0), (0, slots - length)))).to(device)
        cache = KVCache(self.config, batch, slots, self.blocks[0].qkv.weight)
        columns = (passes.start, passes.first, passes.size, passes.end, passes.below)
        tables = torch.tensor(np.stack(columns, axis=1)).to(device)[..., None]
        for row, width, most in zip(tables, widths, passes.size.max(axis=1), strict=True):
            start, first, size, end, below = row
            slot = start + torch.arange(int(width), device=device)
            rank = torch.where(slot < below, 0, slot // s["rank_block"])
            rank = torch.where(slot < end, rank, UNREAD)
            token = torch.where(slot < first + shift, known.gather(1, slot), mask_id)
            column = torch.arange(int(most), device=device)[None]
            pick = (first - start + column).clamp(max=int(width) - 1)
            cache.window(start[:, 0], int(width))
            position, context = order.gather(1, slot), torch.ones_like(rank, dtype=torch.bool)
            logits = self.run(token, position, rank, context, cache, pick)
            if not most:
                continue
            chosen = sampler(self.without_mask(logits), position.gather(1, pick))
            place = first + shift + column
            chosen = torch.where(column < size, chosen, known.gather(1, place))
            known = known.scatter(1, place, chosen)
        return known[:, shift : shift + length]
