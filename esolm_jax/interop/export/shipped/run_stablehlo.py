"""python run_stablehlo.py [PROMPT …] [--temperature=0.8 …]: prints texts. Needs jax, and
flatbuffers (for jax.export)."""

import pathlib
import sys

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

if __package__:
    from . import command, plain_transformer
else:
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
    import command
    import plain_transformer

NARROW = 2  # slots of a window: the last token, and the mask of the next one


def load_weights(path):
    """The first argument of every artefact."""
    return {
        name: jnp.asarray(array.view(jnp.bfloat16) if dtype == "BF16" else array)
        for name, (dtype, array) in plain_transformer.stored_arrays(path).items()
    }


def load(path):
    """The artefact as a jitted function: (weights, …) → its outputs."""
    return jax.jit(jax.export.deserialize(bytearray(path.read_bytes())).call)


def arguments(s, passes, rows, keys):
    """The arguments of sample.stablehlo after the weights.

    Args:
      s: the section `sampling` of config.json, with the settings of the run.
      passes: of schedule_esolm.plan_passes.
      rows: int32 [B, L], known tokens, −1 elsewhere.
      keys: uint32 [B, 2], of decode_loop.row_keys.
    """
    widths = (passes.end - passes.start).max(axis=1, initial=0)
    prompt = int(np.argmax(np.append(passes.size.max(axis=1, initial=0), 1) > 0))
    wide = np.flatnonzero(widths[prompt:] > NARROW)
    cut = prompt + (int(wide[-1]) + 1 if wide.size else 0)
    top_k = np.int32(min(s["top_k"], s["vocab_size"]))
    settings = np.float32(s["temperature"]), top_k, np.float32(s["top_p"])
    ranges = (0, prompt), (prompt, cut), (cut, len(widths))
    tables = [array for low, high in ranges for array in table(passes, low, high)]
    return keys, *settings, rows.astype(np.int32), passes.order.astype(np.int32), *tables


def table(passes, low, high):
    """int32 (passes [n, 5, B], 0 … window − 1, 0 … most generated tokens − 1). An empty range
    becomes one pass that generates nothing, and writes to slots behind the text."""
    columns = passes.start, passes.first, passes.size, passes.end, passes.below
    rows = np.stack([column[low:high] for column in columns], axis=1).astype(np.int32)
    if not len(rows):
        batch, length = passes.order.shape
        rows = np.tile(np.array([[[length], [length], [0], [length], [0]]], np.int32), batch)
    window, most = (rows[:, 3] - rows[:, 0]).max(initial=1), rows[:, 2].max(initial=1)
    return rows, np.arange(window, dtype=np.int32), np.arange(most, dtype=np.int32)


def make_generate(folder, config):
    weights = load_weights(folder / "weights.safetensors")
    sample = load(folder / "sample.stablehlo")

    def generate(s, passes, rows, keys):
        return np.asarray(sample(weights, *arguments(s, passes, rows, keys)))

    return generate


if __name__ == "__main__":
    command.main(__doc__, make_generate)
