"""python run_stablehlo.py [PROMPT …] [--temperature=0.8 …]: prints texts. Needs jax, and
flatbuffers (for jax.export)."""

import pathlib
import sys

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

if not __package__:
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

NARROW = 2  # slots of a window: the last token, and the mask of the next one


def load_weights(path):
    """The first argument of every artefact."""
    from plain_transformer import stored_arrays

    return {
        name: jnp.asarray(array.view(jnp.bfloat16) if dtype == "BF16" else array)
        for name, (dtype, array) in stored_arrays(path).items()
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
    cut = np.flatnonzero(widths > NARROW)
    cut = int(cut[-1]) + 1 if cut.size else 0
    settings = np.float32(s["temperature"]), np.int32(s["top_k"]), np.float32(s["top_p"])
    order = passes.order.astype(np.int32)
    tables = table(passes, 0, cut), table(passes, cut, len(widths))
    return keys, *settings, rows.astype(np.int32), order, *tables[0], *tables[1]


def table(passes, low, high):
    """int32 (passes [n, 5, B], 0 … window − 1, 0 … most generated tokens − 1). An empty range
    becomes one pass that generates nothing."""
    columns = passes.start, passes.first, passes.size, passes.end, passes.below
    rows = np.stack([column[low:high] for column in columns], axis=1).astype(np.int32)
    rows = rows if len(rows) else np.zeros((1, *rows.shape[1:]), np.int32)
    window, most = (rows[:, 3] - rows[:, 0]).max(initial=1), rows[:, 2].max(initial=1)
    return rows, np.arange(window, dtype=np.int32), np.arange(most, dtype=np.int32)


def make_generate(folder, config):
    weights = load_weights(folder / "weights.safetensors")
    sample = load(folder / "sample.stablehlo")

    def generate(s, passes, rows, keys):
        return np.asarray(sample(weights, *arguments(s, passes, rows, keys)))

    return generate


if __name__ == "__main__":
    import command

    command.main(__doc__, make_generate)
