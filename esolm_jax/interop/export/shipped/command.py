"""What the scripts share: the command line → settings, prompts and passes → texts."""

import json
import pathlib
import sys

import numpy as np

if __package__:
    from . import options, schedule_esolm, text_codec
    from .decode_loop import chooser, row_keys, run_passes
else:
    import options
    import schedule_esolm
    import text_codec
    from decode_loop import chooser, row_keys, run_passes


def main(description, make_generate, arguments=None):
    """Prints the texts that the command line asks for. A bad option or prompt ends the script.

    Args:
      make_generate: (folder, config) → generate(s, passes, rows, keys) → int32 [B, L], where `s`
        is the section `sampling` of config.json with the settings of the run.
    """
    folder = pathlib.Path(__file__).resolve().parent
    given = options.parse(description, arguments)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    try:
        codec = text_codec.load(folder)
        batches = list(_batches(config["sampling"], given, codec))
    except ValueError as error:
        options.fail(error)
    if config["sampling"]["note"]:
        print(f"note: {config['sampling']['note']}", file=sys.stderr)
    generate, texts, is_known = make_generate(folder, config), [], []
    for s, passes, rows, keys in batches:
        texts += generate(s, passes, rows, keys).tolist()
        is_known += (rows[:, 0] >= 0).tolist()
    print(text_codec.show(codec, texts, is_known, as_ids=given.ids))


def _batches(sampling, given, codec):
    """(settings, passes, rows, keys) of each prompt."""
    length = schedule_esolm.checked(sampling, {}, given.length)["length"]
    prompts = [text_codec.parse_prompt(codec, text, length) for text in given.prompts]
    for n, prompt in enumerate(prompts or [[-1] * length]):
        s = schedule_esolm.checked(sampling, options.settings(given), len(prompt))
        rows = np.tile(np.array(prompt, np.int32), (given.num_texts, 1))
        first_row = n * given.num_texts
        passes = schedule_esolm.plan_passes(s, rows >= 0, given.seed, first_row)
        schedule_esolm.check_passes(s, passes)
        yield s, passes, rows, row_keys(given.seed, len(rows), first_row)


def with_step(step, cache_dtype=np.float32):
    """generate of a step: a function as plain_transformer.step, of NumPy arrays."""

    def generate(s, passes, rows, keys):
        return run_passes(step, s, passes, rows, chooser(s, keys), cache_dtype=cache_dtype)

    return generate
