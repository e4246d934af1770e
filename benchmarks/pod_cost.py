"""The cost of the configs on TPU pods and nodes of GPUs: docs/pod_cost.{json,md,png}.

    JAX_PLATFORMS=cpu python -m benchmarks.pod_cost [--only=configs,scaling,work,gpus,length]
        [--match=7b]

Needs `pip install 'esolm_jax[tpu,gpu-compiler]'` (the compilers; no TPU or GPU) and about 40
minutes on two cores.
Earlier figures stay in the JSON until they are replaced.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import importlib.metadata
import json
import multiprocessing
import pathlib

import jax
import jax.numpy as jnp

from benchmarks import report_writer
from benchmarks.pod_cost_cases import (
    CHIPS,
    LENGTHS,
    OWN_ROWS,
    ROWS,
    SECTIONS,
    Case,
)
from esolm_jax import compile as compile_lib
from esolm_jax import results
from esolm_jax.aot.chips import GIB
from esolm_jax.model.lm_head import token_nll
from esolm_jax.training.phase_loss import PhaseLoss

OUT = pathlib.Path(__file__).parents[1] / "docs" / "pod_cost"
COMPILERS = ("libtpu", "jax-cuda12-plugin")


class FullLoss(PhaseLoss):
    """The same objective with all logits in memory, for comparison."""

    def losses(self, params, labelled, num_tokens, dropout_key=None):
        tokens = tuple(part.tokens for part in labelled)
        predict = tuple((0, part.target.shape[1]) for part in labelled)
        logits = self.apply(params, tokens, predict=predict, dropout_key=dropout_key)
        mask_id = self.head.mask_id
        return jnp.stack(
            [
                jnp.sum(part.weight * token_nll(z, part.target, mask_id)) / count
                for z, part, count in zip(logits, labelled, num_tokens, strict=True)
            ]
        )


def measure(one: Case) -> dict:
    config = one.config()
    if not one.full_loss:
        return compile_lib.measure(config, one.topology, one.num_slices)
    training = compile_lib.make_training(config, one.topology)
    fields = {f.name: getattr(training.objective, f.name) for f in dataclasses.fields(PhaseLoss)}
    training.objective = FullLoss(**fields)
    figures = compile_lib.describe(config, training, one.topology, 1)
    try:
        stats = compile_lib.compile_step(training).memory_analysis()
    except compile_lib.OutOfMemory as error:
        return figures | {"message": str(error)}
    return figures | {"temporaries": stats.temp_size_in_bytes}


def run(names: list[str], match: str, workers: int, path: pathlib.Path) -> dict:
    """Measures the cases of sections with `match` in their names; writes the JSON after each."""
    found = json.loads(path.read_text()) if path.exists() else {}
    found["versions"] = {"jax": jax.__version__} | {
        package: importlib.metadata.version(package) for package in COMPILERS
    }
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, context, max_tasks_per_child=1) as pool:
        cases = [(s, one) for s in names for one in SECTIONS[s] if match in one.name]
        tasks = {pool.submit(measure, one): (s, one) for s, one in cases}
        for done, task in enumerate(concurrent.futures.as_completed(tasks), 1):
            section, one = tasks[task]
            commit = {"commit": report_writer.commit()}
            found.setdefault(section, {})[one.name] = task.result() | commit
            results.write_json(path, found)
            print(f"[{done}/{len(tasks)}] {section}: {one.name}", flush=True)
    for section, cases in SECTIONS.items():  # in order, without obsolete sections
        kept = found.get(section, {})
        found[section] = {c.name: kept[c.name] for c in cases if c.name in kept}
    return found


def temporaries(figures: dict) -> float | None:
    """Bytes in addition to the state, activations included."""
    if "hbm" in figures and "total" in figures["hbm"]:
        return figures["hbm"]["activations"] + figures["hbm"]["temporaries"]
    return figures.get("temporaries")


def table(found: dict) -> str:
    """The figures as Markdown."""
    text = "# Cost of training on TPU pods and GPUs\n\n"
    compilers = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    text += f"Made by `python -m benchmarks.pod_cost` with the compilers ({compilers}), without a "
    text += "TPU or GPU. "
    text += "Memory, FLOPs and bytes are those of the compiled programs; times are rooflines, not "
    text += (
        "measurements. FLOPs count matrix products. Those of an attention kernel are the blocks "
    )
    text += "that it computes; the head includes half a chunk for rounding. Their ratio is to the "
    text += (
        "lower bound (esolm_jax/aot/lower_bound.py: attention at the visible pairs, three times "
    )
    text += "forward, no recomputation). Bytes sent assume ring algorithms; their ratio is to the "
    text += (
        "ideal of the sharding. `step ms` and `MFU <=` are of the slowest of products, network, "
    )
    text += "and reading and writing the state and the kept activations once. `with memory` is the "
    text += "time of all kernels one after another, each as fast as its products or the bytes that "
    text += "it reads and writes allow, and the MFU of that, without the network.\n"
    parts = {
        "Every config on its pod": _configs,
        "All objectives at one batch (512 x 1024, remat none, v5p:2x2x4)": _work,
        f"The same {ROWS} rows a chip on more chips (owt:0.5)": _scaling,
        "GPUs": _gpus,
        "Temporaries against length (owt:0.5 on v5p:2x2x1, remat full; as configured it is "
        f"{OWN_ROWS} rows of 1024 a chip)": _lengths,
    }
    text += "".join(f"\n## {name}\n\n{part(found)}" for name, part in parts.items())
    return text + "\n" + _commits(found)


def _commits(found: dict) -> str:
    """At which commits the rows of each section were recorded."""
    parts = []
    for section in SECTIONS:
        rows = found.get(section, {}).values()
        commits = sorted({f.get("commit", "b79972c or before") for f in rows})
        parts.append(f"{section} at {', '.join(f'commit {name}' for name in commits)}")
    return f"Recorded: {'; '.join(parts)}. Times to compile are of two cores.\n"


def _configs(found: dict) -> str:
    head = "config", "pod", "mesh", "batch x L", "remat", "HBM GiB", "FLOPs x", "sent x", "step ms"
    rows = [_cells(name, f) for name, f in found.get("configs", {}).items()]
    return report_writer.table([*head, "MFU <=", "with memory"], rows) + _changed(found)


def _changed(found: dict) -> str:
    """Which rows were recorded with another remat policy than the config has now."""
    configs, changed = found.get("configs", {}), {}
    for one in SECTIONS["configs"]:
        remat = one.config().model.remat
        if one.name in configs and configs[one.name]["remat"] != remat:
            changed.setdefault(remat, set()).add(f"{one.file}:{one.argument}")
    parts = [f"{', '.join(sorted(names))} (now {remat})" for remat, names in changed.items()]
    if not parts:
        return ""
    return f"\nOlder than their configs are rows of {'; '.join(parts)}: see training_cost.md.\n"


def _work(found: dict) -> str:
    work, rows = found.get("work", {}), []
    mdlm = next((f["flops"]["compiled"] for n, f in work.items() if ":mdlm" in n), None)
    for name, f in work.items():
        flops = f["flops"]
        cells = [name.split()[0].split(":")[1], f"{flops['compiled'] / 1e12:.2f}"]
        cells += [f"{flops['ratio']:.3f}", f"{flops['compiled'] / mdlm:.3f}" if mdlm else ""]
        rows.append([*cells, f"{f['collectives']['ratio']:.3f}"])
    return report_writer.table(
        ["objective", "TFLOPs a chip", "x lower bound", "x mdlm", "sent x"], rows
    )


def _scaling(found: dict) -> str:
    rows = []
    for f in found.get("scaling", {}).values():
        sent = f["collectives"]
        cells = [f["topology"], f["chips"], _mesh(f), f"{f['hbm']['total'] / GIB:.2f}"]
        cells += [f"{sum(sent['sent'].values()) / 1e6:.0f}", f"{sent['ratio']:.3f}"]
        rows.append([*cells, len(sent["stray_gathers"])])
    head = "pod", "chips", "mesh", "HBM GiB", "MB sent a chip", "sent x", "whole stacks"
    return report_writer.table(head, rows)


def _gpus(found: dict) -> str:
    rows = []
    for name, f in found.get("gpus", {}).items():
        cells = [name.split()[0], f["topology"], _mesh(f), f"{f['batch_size']} x {f['seq_len']}"]
        if "flops" not in f:
            rows.append([*cells, "does not fit", *[""] * 6])
            continue
        line = f["roofline"]
        cells += [f"{f['hbm']['total'] / GIB:.2f} of {f['hbm']['available'] / GIB:.0f}"]
        cells += [f"{f[kind]['ratio']:.3f}" for kind in ("flops", "collectives")]
        cells += [f"{1e3 * line['step_seconds']:.0f}", f"{line['mfu']:.0%}", _with_memory(f)]
        rows.append([*cells, f"{f['compile_seconds']:.0f}"])
    head = ["config", "GPUs", "mesh", "batch x L", "HBM GiB", "FLOPs x", "sent x", "step ms"]
    table = report_writer.table([*head, "MFU <=", "with memory", "compile s"], rows)
    return table + _across_nodes(found)


def _across_nodes(found: dict) -> str:
    """How bytes sent and memory hold at the same batch per GPU on more nodes."""
    fitting = {n: f for n, f in found.get("gpus", {}).items() if "flops" in f}
    by_config: dict[str, list[float]] = {}
    for name, f in fitting.items():
        by_config.setdefault(name.split()[0], []).append(f["hbm"]["total"])
    growths = [max(sizes) / min(sizes) - 1 for sizes in by_config.values() if len(sizes) > 1]
    if not growths:
        return ""
    sent = max(f["collectives"]["ratio"] for f in fitting.values())
    return (
        f"\nA GPU sends at most {sent:.3f} x the ideal. With the same batch per GPU, its memory on "
        f"one node and on eight differs by {max(growths):.1%} at most. h100:8x8 is eight nodes of "
        "eight; all that is sent is assumed to go over the network between them.\n"
    )


def _lengths(found: dict) -> str:
    lines = []
    for length, rows in [*((n, ROWS) for n in LENGTHS), (LENGTHS[0], OWN_ROWS)]:
        ours, full = (_at_length(found, length, full, rows) for full in (False, True))
        if ours is None:
            continue
        cells = [length, rows, f"{ours / GIB:.2f}", f"{ours / GIB / (length * rows / 8192):.3f}"]
        lines.append(cells + ([f"{full / GIB:.2f}", f"{ours / full:.2f}"] if full else ["", ""]))
    head = "L", "rows a chip", "GiB", "GiB / 8192 tokens", "with all logits", "ratio"
    return report_writer.table(head, lines)


def _mesh(figures: dict) -> str:
    return " ".join(f"{k}={v}" for k, v in figures["mesh"].items() if v > 1)


def _cells(name: str, f: dict) -> list:
    slices = f" x {f['num_slices']}" if f["num_slices"] > 1 else ""
    cells = [name.split()[0], f["topology"] + slices, _mesh(f)]
    cells += [f"{f['batch_size']} x {f['seq_len']}", f["remat"]]
    if "flops" not in f:
        return cells + ["does not fit"] + [""] * 5
    line = f["roofline"]
    return cells + [
        f"{f['hbm']['total'] / GIB:.2f} of {f['hbm']['available'] / GIB:.0f}",
        f"{f['flops']['ratio']:.2f}",
        f"{f['collectives']['ratio']:.2f}",
        f"{1e3 * line['step_seconds']:.0f}",
        f"{line['mfu']:.0%}",
        _with_memory(f),
    ]


def _with_memory(f: dict) -> str:
    moved = f.get("traffic", {})
    if "mfu" not in moved:  # recorded before it was counted
        return ""
    return f"{1e3 * moved['step_seconds']:.0f} ms, {moved['mfu']:.0%}"


def _at_length(found: dict, length: int, full: bool, rows: int = ROWS) -> float | None:
    for name, f in found.get("length", {}).items():
        is_it = f["seq_len"] == length and f["batch_size"] == CHIPS * rows
        if is_it and ("full-loss" in name) == full:
            return temporaries(f)
    return None


def plot(found: dict, path: pathlib.Path) -> None:
    """HBM and bytes a chip against chips, temporaries against length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.5), layout="constrained")
    points = list(found.get("scaling", {}).values())
    chips = [f["chips"] for f in points]
    axes[0].plot(chips, [f["hbm"]["total"] / GIB for f in points], "o-", label="total")
    axes[0].plot(chips, [temporaries(f) / GIB for f in points], "s--", label="temporaries")
    axes[0].set(title="HBM of a chip", ylabel="GiB", xlabel="chips", ylim=0)
    for kind, style in (("sent", "o-"), ("ideal", "s--")):
        sent = [sum(f["collectives"][kind].values()) / 1e9 for f in points]
        axes[1].plot(chips, sent, style, label={"sent": "compiled"}.get(kind, kind))
    axes[1].set(title="sent by a chip in a step", ylabel="GB", xlabel="chips", ylim=0)
    for axis in axes[:2] if points else ():
        axis.set_xscale("log", base=2)
        axis.set_xticks(chips, chips)
    for full, label in ((False, "this loss"), (True, "all logits held")):
        pairs = [(n, _at_length(found, n, full)) for n in LENGTHS]
        pairs = [(n, value / GIB) for n, value in pairs if value]
        if pairs:
            axes[2].plot(*zip(*pairs, strict=True), "o-", label=label)
    axes[2].set(title="temporaries of a chip", ylabel="GiB", xlabel="L", ylim=0)
    for axis in axes:
        axis.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, comma-separated")
    parser.add_argument("--match", default="", help="only cases with this in their name")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=pathlib.Path, default=OUT)
    arguments = parser.parse_args()
    names = [name for name in arguments.only.split(",") if name]
    found = run(names, arguments.match, arguments.workers, arguments.out.with_suffix(".json"))
    report_writer.write(arguments.out, found, table(found), functools.partial(plot, found))


if __name__ == "__main__":
    main()
