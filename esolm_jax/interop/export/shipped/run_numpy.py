"""python run_numpy.py [PROMPT …] [--temperature=0.8 …]: prints texts. Needs only numpy."""

import functools
import pathlib
import sys

if not __package__:
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

import command  # noqa: E402
import decode_loop  # noqa: E402
import plain_transformer  # noqa: E402


def make_generate(folder, config):
    bound = plain_transformer.read_safetensors(folder / "weights.safetensors"), config["network"]
    if config["sampling"]["has_step"]:
        step = functools.partial(plain_transformer.step, *bound)
    else:
        step = decode_loop.without_cache(functools.partial(plain_transformer.score, *bound))
    config["sampling"]["cache_dtype"] = "float32"  # NumPy computes in float32
    return command.with_step(step)


if __name__ == "__main__":
    command.main(__doc__, make_generate)
