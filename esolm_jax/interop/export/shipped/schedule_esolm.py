"""Orders, step sizes and passes of two-phase generation. Needs numpy alone.

`s` is the `sampling` section of config.json: how the family labels tokens, and the settings of
generate(). Slot j of a row holds the token of rank j in the order of generation.
"""

import dataclasses

import numpy as np

UNREAD = 2**31 - 1  # a rank that no other token reads: of empty slots and of padding
NOISE_EPS = 1e-3  # α_t = α₀ (1 − (1 − ε) t)


def _then_left_to_right(positions, sizes):
    """The first Σ sizes positions in their order (diffusion), then the others left to right."""
    n = int(np.sum(sizes))
    order = np.concatenate([positions[:n], np.sort(positions[n:])])
    return order, [*sizes, *[1] * (len(positions) - n)], np.arange(len(order)) < n


def _ancestral(rng, size_rng, positions, alpha_0, steps):
    """`steps` split α from 0 to α₀: Binomial(remaining, p) positions each; 0 = one per step."""
    if not steps:
        sizes = [1] * rng.binomial(len(positions), alpha_0)
        return _then_left_to_right(rng.permutation(positions), sizes)
    alpha = alpha_0 * (1 - (1 - NOISE_EPS) * np.linspace(1.0, 0.0, steps + 1))
    sizes, remaining = [], len(positions)
    for p in (alpha[1:] - alpha[:-1]) / (1 - alpha[:-1]):
        if not remaining:
            break
        sizes.append(size_rng.binomial(remaining, min(max(p, 0.0), 1.0)))
        remaining -= sizes[-1]
    sizes += [remaining] if alpha_0 == 1 else []
    return _then_left_to_right(rng.permutation(positions), [size for size in sizes if size])


def draw_row(s, unknown, length, seed, row):
    """(order of the unknown positions, step sizes, which are the diffusion phase's)."""
    name, steps = s["schedule"], s["steps"]

    def of_sizes(count):
        return np.random.default_rng([seed, 1, count])

    rng = np.random.default_rng([seed, 0, row])
    if name == "left_to_right":
        return _then_left_to_right(unknown, [])
    if name == "ancestral":
        return _ancestral(rng, of_sizes(len(unknown)), unknown, s["alpha_0"], steps)
    if name in ("strided", "shuffled_strided"):
        n = min(steps or len(unknown), len(unknown))
        strides = np.arange(n) if name == "strided" else of_sizes(n).permutation(n)
        groups = [unknown[i::n] for i in strides]
        sizes = [len(group) for group in groups[: round(s["alpha_0"] * n)]]
        return _then_left_to_right(np.concatenate([*groups, unknown[:0]]), sizes)
    width, parts = s["block_length"], []
    blocks = -(-length // width)
    for block in range(blocks):
        here = unknown[unknown // width == block]
        of_block = steps and max(1, steps // blocks + (block < steps % blocks))
        size_rng = of_sizes(len(here) + block * len(unknown))
        parts.append(_ancestral(rng, size_rng, here, s["alpha_0"], of_block))
    orders, sizes, diffusion = zip(*parts, strict=True)
    return np.concatenate(orders), sum(sizes, []), np.concatenate(diffusion)


@dataclasses.dataclass(frozen=True)
class Passes:
    """Windows of slots; slot j holds the token of rank j (with shift 1, of rank j − 1).

    order: [B, L], the position of each rank. start, first, size, end, below: [passes, B]: a pass
    runs [start, end), generates `size` slots from `first` on, and slots below `below` have rank 0.
    """

    order: np.ndarray
    start: np.ndarray
    first: np.ndarray
    size: np.ndarray
    end: np.ndarray
    below: np.ndarray


def plan_passes(s, known, seed, first_row=0):
    """The passes for rows with these known positions, bool [B, L]. Row b is text `first_row` + b of
    the seed."""
    batch, length = known.shape
    order, columns, prefix = np.zeros((batch, length), np.int64), [], []
    for b in range(batch):
        given = np.flatnonzero(known[b])
        rest, sizes, diffusion = draw_row(s, np.flatnonzero(~known[b]), length, seed, first_row + b)
        order[b] = [*given, *rest]
        columns.append(sizes)
        prefix.append(len(given) + (np.flatnonzero(diffusion).max(initial=-1) + 1))
    size = np.zeros((max(map(len, columns)), batch), np.int64)
    for b, sizes in enumerate(columns):
        size[: len(sizes), b] = sizes
    num_known, prefix = known.sum(axis=1), np.array(prefix)
    first = num_known + np.cumsum(size, axis=0) - size
    before = np.concatenate([num_known[None], first[:-1]])[: len(first)]
    prefill, start, end, below = _windows(s, num_known, prefix, first, before, size, length)
    start, end = np.where(size == 0, 0, start), np.where(size == 0, 0, end)
    if prefill.any():  # one pass that generates nothing puts the prompt in the cache
        none = np.zeros_like(prefill)
        old, new = (start, first, size, end, below), (none, prefill, none, prefill, none)
        rows = zip(new, old, strict=True)
        start, first, size, end, below = (np.concatenate([a[None], b]) for a, b in rows)
    return Passes(order, start, first, size, end, below)


def _windows(s, num_known, prefix, first, before, size, length):
    """(slots of the prompt that are cached first, start, end, below) of the family."""
    zero = np.zeros_like(first)
    if s["cached"]:  # a token reads lower ranks only: new tokens and this pass's masks
        return num_known, first if s["shift"] else before, first + size, zero
    if s["prefix_of_one_rank"]:  # tokens of the diffusion phase read each other
        return (
            0 * num_known,
            np.where(first > prefix, before, 0),
            first + size,
            np.minimum(first, prefix),
        )
    width = s["rank_block"]  # tokens of a block read each other
    block, whole = first // width, num_known // width
    is_new = np.diff(block, axis=0, prepend=whole[None]) > 0
    return whole * width, (block - is_new) * width, np.minimum((block + 1) * width, length), zero


def checked(defaults, settings, length):
    """The settings of generation. ValueError: unknown, or not allowed for this family."""
    names = ("alpha_0", "schedule", "steps", "block_length", "temperature", "top_k", "top_p")
    if unknown := settings.keys() - set(names):
        raise ValueError(f"{', '.join(sorted(unknown))}: must be one of {', '.join(names)}")
    given = {name: value for name, value in settings.items() if value is not None}
    s = {**defaults, **given, "length": length or defaults["length"]}
    rules = {
        "alpha_0": (defaults["fixed_alpha_0"] in (None, s["alpha_0"]), defaults["fixed_alpha_0"]),
        "schedule": (s["schedule"] in s["schedules"], f"one of {', '.join(s['schedules'])}"),
        "steps": (s["steps"] >= 0 and not (s["one_token"] and s["steps"]), "at least 0 (ar: 0)"),
        "length": (1 <= s["length"] <= s["max_length"], f"in [1, {s['max_length']}]"),
        "temperature": (0 <= s["temperature"] < float("inf"), "at least 0"),
        "top_p": (0 < s["top_p"] <= 1, "in (0, 1]"),
        "top_k": (s["top_k"] >= 0, "at least 0"),
    }
    for name, (is_right, allowed) in rules.items():
        if not is_right:
            raise ValueError(f"{name}={s[name]!r}: must be {allowed}")
    if not 0 <= s["alpha_0"] <= 1:
        raise ValueError(f"alpha_0={s['alpha_0']!r}: must be in [0, 1]")
    s["schedule"] = s["replaced_schedules"].get(s["schedule"], s["schedule"])
    if s["schedule"] == "ancestral" and s["length"] > s["trained_length"]:
        s["schedule"] = "blockwise"
    if s["schedule"] == "left_to_right":
        s["steps"] = 0
    return s


def check_passes(s, passes):
    """ValueError: the family cannot generate in this order."""
    slot = np.arange(passes.order.shape[1])[None]
    if s["shift"] and (passes.order != slot).any():
        raise ValueError("input_ids: an autoregressive model continues a prompt at the start")
    if not s["cached"] and not s["prefix_of_one_rank"]:
        width = s["rank_block"]
        end = (passes.first // width + 1) * width
        crosses = (passes.first + passes.size > end) & (passes.size > 0)
        if crosses.any() or (passes.order // width != slot // width).any():
            raise ValueError(f"input_ids: the model generates blocks of {width} tokens, in order")
