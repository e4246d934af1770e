"""python run_numpy.py [COUNT] [SEED] [TEMPERATURE]: token ids. Needs only numpy."""

import functools
import json
import pathlib
import sys

import numpy as np

FOLDER = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER))

import decode_loop  # noqa: E402
import plain_transformer  # noqa: E402


def main(count="1", seed="0", temperature=None):
    weights, config = plain_transformer.load(FOLDER)
    plan, rng = config["sampling"], np.random.default_rng([int(seed), 2])
    temperature = plan["temperature"] if temperature is None else temperature
    order, num_diffusion = decode_loop.draw_orders(plan, int(seed), int(count))
    choose = decode_loop.chooser(plan, decode_loop.read_temperature(temperature), rng)
    bound = weights, config["network"]
    if plan["cached"]:
        step = functools.partial(plain_transformer.step, *bound)
        text = decode_loop.with_cache(step, plan, order, choose)
    else:
        score = functools.partial(plain_transformer.score, *bound)
        text = decode_loop.without_cache(score, plan, order, num_diffusion, choose)
    print("\n".join(json.dumps(row) for row in text.tolist()))


if __name__ == "__main__":
    main(*sys.argv[1:])
