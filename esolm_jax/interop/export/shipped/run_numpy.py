"""python run_numpy.py [PROMPT …] [--temperature=0.8 …]: prints texts. Needs only numpy."""

import functools
import pathlib
import sys

if __package__:
    from . import command, decode_loop, plain_transformer
else:
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
    import command
    import decode_loop
    import plain_transformer


def make_generate(folder, config):
    bound = plain_transformer.read_safetensors(folder / "weights.safetensors"), config["network"]
    if config["sampling"]["has_step"]:
        return command.with_step(functools.partial(plain_transformer.step, *bound))
    score = functools.partial(plain_transformer.score, *bound)
    return command.with_step(decode_loop.without_cache(score))


if __name__ == "__main__":
    command.main(__doc__, make_generate)
