"""python -m benchmarks.exports --workdirs=DIR,DIR2: exports of every type of weights, compared.

For each model and type: the size of each artefact with its weights, its error (as `export` measures
it, against the trained float32 model) and the seconds that it takes for 4 texts of 64 tokens, one
token per pass (the median of 3 after a first one; the types are interleaved). Writes
docs/export_formats.{json,md}.
"""

import argparse
import functools
import json
import pathlib
import sys
import tempfile

import numpy as np

from benchmarks import report_writer
from benchmarks.interleaved_timings import timed
from esolm_jax.interop.export import folder as export_folder
from esolm_jax.interop.export import weight_storage
from esolm_jax.interop.export.shipped import (
    decode_loop,
    run_numpy,
    run_onnx,
    run_stablehlo,
    schedule_esolm,
)
from esolm_jax.training import checkpoint_meta

TEXTS, LENGTH, REPEATS = 4, 64, 3
SETTINGS = {"steps": 0, "temperature": 1.0}


def _generators(folder: pathlib.Path) -> dict:
    """File → a function that generates the texts with it, as the shipped scripts do."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    length = min(LENGTH, config["sampling"]["length"])
    s = schedule_esolm.checked(config["sampling"], SETTINGS, length)
    rows, keys = np.full((TEXTS, length), -1, np.int32), decode_loop.row_keys(0, TEXTS)
    passes = schedule_esolm.plan_passes(s, rows >= 0, 0)
    scripts = {
        "weights.safetensors": run_numpy,
        "step.onnx" if s["has_step"] else "score.onnx": run_onnx,
        "sample.stablehlo": run_stablehlo,
    }
    return {
        file: functools.partial(script.make_generate(folder, config), s, passes, rows, keys)
        for file, script in scripts.items()
    }


def measure(workdir: pathlib.Path, dtypes: tuple[str, ...], scratch: pathlib.Path) -> dict:
    """The figures of each type of weights and artefact of a model."""
    config, rows, generators = checkpoint_meta.saved_config(workdir), [], {}
    for dtype in dtypes:
        folder = scratch / dtype
        manifest = export_folder.export(config, workdir, folder, export_folder.Wanted(dtype=dtype))
        made = _generators(folder)
        weights = manifest["files"]["weights.safetensors"]["bytes"]
        for entry in manifest["artefacts"]:
            file = entry["file"]
            own = 0 if file == "weights.safetensors" else manifest["files"][file]["bytes"]
            figures = {k: v for k, v in entry["parity"].items() if k != "batch_sizes"}
            row = {"dtype": dtype, "file": file, "function": entry["function"]}
            rows.append(row | {"bytes": weights + own, "seconds": None} | figures)
            generates = "step" if manifest["sampling"]["has_step"] else "score"
            if file in made and entry["function"] in (generates, "sample"):
                generators[dtype, file] = made[file]
        print(workdir.name, dtype, flush=True)
    for file in dict.fromkeys(file for _, file in generators):
        pairs = [(dtype, call) for (dtype, name), call in generators.items() if name == file]
        for _, call in pairs:
            call()
        seconds, _ = timed([call for _, call in pairs], REPEATS)
        for (dtype, _), taken in zip(pairs, seconds, strict=True):
            last = [row for row in rows if (row["dtype"], row["file"]) == (dtype, file)][-1]
            last["seconds"] = taken
    model = config.model
    described = f"{config.objective}, {model.style}, {model.width} x {model.blocks}"
    return {"model": described, "step": manifest["step"], "rows": rows}


def _cells(row: dict) -> list[str]:
    change = row.get("perplexity_change")
    equal = row.get("greedy_agreement", 1.0 if row.get("greedy_identical") else None)
    return [
        row["dtype"],
        row["file"],
        row["function"],
        f"{row['bytes'] / 1e6:.2f}",
        f"{row['max_logit_error']:.1e}" if "max_logit_error" in row else "",
        "" if change is None else f"{100 * change:+.2g}",
        "" if equal is None else f"{100 * equal:.4g}",
        "" if row["seconds"] is None else f"{row['seconds']:.2f}",
    ]


def page(found: list[dict]) -> str:
    head = ["weights", "file", "function", "MB", "logit error", "perplexity, %"]
    head += ["equal greedy tokens, %", "seconds"]
    tables = "\n\n".join(
        f"## {model['model']}\n\n{report_writer.table(head, map(_cells, model['rows']))}"
        for model in found
    )
    return f"""# Exported formats and types of weights

Made by `python -m benchmarks.exports --workdirs=DIR,DIR2`. MB: the artefact and its weights. Logit error: the largest
difference to the trained float32 model. Perplexity: the relative change of the perplexity of texts that the float32
model draws, in expectation over each next token. Seconds: {TEXTS} texts of {LENGTH} tokens, one token per pass, on this
CPU, which has no products of 16 bits: NumPy widens the weights at load, ONNX Runtime float16 products in each pass.

{tables}"""  # noqa: E501


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdirs", required=True)
    parser.add_argument("--dtypes", default=",".join(weight_storage.DTYPES))
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("docs/export_formats"))
    args = parser.parse_args()
    found = []
    for workdir in args.workdirs.split(","):
        with tempfile.TemporaryDirectory() as scratch:
            dtypes = tuple(args.dtypes.split(","))
            found.append(measure(pathlib.Path(workdir), dtypes, pathlib.Path(scratch)))
    report_writer.write(args.out, {"models": found}, page(found))


if __name__ == "__main__":
    sys.exit(main())
