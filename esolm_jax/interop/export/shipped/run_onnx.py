"""python run_onnx.py [PROMPT …] [--temperature=0.8 …]: prints texts. Needs numpy, onnxruntime."""

import pathlib
import sys

import onnxruntime

if __package__:
    from . import command, decode_loop
else:
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
    import command
    import decode_loop


def load(path, options=None):
    """The artefact as a function from NumPy arrays, in the order of its inputs, to a list."""
    session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]
    return lambda *args: session.run(None, dict(zip(names, args, strict=True)))


def make_generate(folder, config):
    sampling = config["sampling"]
    if sampling["has_step"]:
        return command.with_step(load(folder / "step.onnx"), sampling["onnx_cache_dtype"])
    score = load(folder / "score.onnx")
    return command.with_step(decode_loop.without_cache(lambda *labels: score(*labels)[0]))


if __name__ == "__main__":
    command.main(__doc__, make_generate)
