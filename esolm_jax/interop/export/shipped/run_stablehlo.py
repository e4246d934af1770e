"""python run_stablehlo.py [COUNT] [SEED] [TEMPERATURE]: token ids. Needs jax and flatbuffers
(for jax.export)."""

import json
import pathlib
import sys

import jax
import jax.numpy as jnp

FOLDER = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER))

import decode_loop  # noqa: E402
from plain_transformer import read_safetensors  # noqa: E402


def load_weights(path):
    """The first argument of every artefact."""
    return {name: jnp.asarray(array) for name, array in read_safetensors(path).items()}


def load(path):
    """The artefact as a jitted function: (weights, …) → its outputs."""
    return jax.jit(jax.export.deserialize(bytearray(path.read_bytes())).call)


def row_keys(seed, count):
    """uint32 [B, 2]: one key per row, those of `python -m esolm_jax.sample`."""
    rows = jnp.arange(count, dtype=jnp.uint32)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed, impl="threefry2x32"), rows)
    return jax.random.key_data(keys)


def main(count="1", seed="0", temperature=None):
    plan = json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))["sampling"]
    temperature = plan["temperature"] if temperature is None else temperature
    temperature = decode_loop.read_temperature(temperature)
    weights, sample = (
        load_weights(FOLDER / "weights.safetensors"),
        load(FOLDER / "sample.stablehlo"),
    )
    order, num_diffusion = decode_loop.draw_orders(plan, int(seed), int(count))
    keys = row_keys(int(seed), int(count))
    text = sample(weights, keys, jnp.float32(temperature), order, num_diffusion)
    print("\n".join(json.dumps(row) for row in text.tolist()))


if __name__ == "__main__":
    main(*sys.argv[1:])
