"""python run_onnx.py [COUNT] [SEED] [TEMPERATURE]: token ids. Needs numpy and onnxruntime."""

import json
import pathlib
import sys

import numpy as np
import onnxruntime

FOLDER = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER))

import decode_loop  # noqa: E402


def load(path, options=None):
    """The artefact as a function from NumPy arrays, in the order of its inputs, to a list."""
    session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]
    return lambda *args: session.run(None, dict(zip(names, args, strict=True)))


def main(count="1", seed="0", temperature=None):
    config = json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))
    plan, rng = config["sampling"], np.random.default_rng([int(seed), 2])
    temperature = plan["temperature"] if temperature is None else temperature
    order, num_diffusion = decode_loop.draw_orders(plan, int(seed), int(count))
    choose = decode_loop.chooser(plan, decode_loop.read_temperature(temperature), rng)
    if plan["cached"]:
        text = decode_loop.with_cache(load(FOLDER / "step.onnx"), plan, order, choose)
    else:
        run = load(FOLDER / "score.onnx")
        text = decode_loop.without_cache(
            lambda *labels: run(*labels)[0], plan, order, num_diffusion, choose
        )
    print("\n".join(json.dumps(row) for row in text.tolist()))


if __name__ == "__main__":
    main(*sys.argv[1:])
