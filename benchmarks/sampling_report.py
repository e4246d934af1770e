"""The targets, table and plot of benchmarks/sampling.py, from its rows."""

import itertools
import math
import pathlib

from benchmarks import published_ratios, report_writer, sampling_cases

LABELS = {
    "eso_b": "Eso-LM (B)",
    "ar": "AR",
    "mdlm": "MDLM",
    "bd3:16": "BD3-LM, L′ = 16",
    "bd3:4": "BD3-LM, L′ = 4",
}


def targets(rows: dict) -> list[dict]:
    """What was aimed at, as far as it was measured."""
    found = []

    def add(what: str, value: float, least=None, most=None, **limits) -> None:
        met = value >= least if most is None else value <= most
        row = {"what": what, "value": value, "at_least": least, "at_most": most, "met": met}
        found.append(row | limits)

    for batch, least in ((1, 4.0), (8, 2.5)):
        size = f"eso_b {batch} x 1024"
        for name in (f"{size}, T = L", f"{size}, T = 1024, alpha_0 = 0.5"):
            if "speed_relative_to_published" in rows.get(name, {}):
                ratio = rows[name]["speed_relative_to_published"]
                ratio = published_ratios.least(ratio, published_ratios.SAMPLING.get(name, []))
                add(f"tokens/s of {name}, over the published code's, at least", ratio, least)
    others = [
        ("mdlm", 1024, 20.0),
        ("mdlm", 8192, 65.0),
        ("bd3:16", 8192, 4.0),
        ("bd3:4", 8192, 5.0),
    ]
    for (family, length, least), batch in itertools.product(others, sampling_cases.BATCHES):
        pair = [rows.get(f"{f} {batch} x {length}, T = L") for f in ("eso_b", family)]
        if all(pair):
            # MDLM could also run its passes as training does: by the faster of the two.
            theirs = min(pair[1]["ms_per_pass"], pair[1].get("training_forward_ms", math.inf))
            ratio, possible = (theirs / pair[0][of] for of in ("ms_per_pass", "read_ms"))
            what = f"eso_b over {family} at L = {length}, batch {batch}, NFE = L"
            limits = [_limit_ms(row) for row in pair]
            add(what, ratio, least, possible=possible, at_both_limits=limits[1] / limits[0])
    for batch in sampling_cases.BATCHES:
        cost = {
            r["length"]: 1 / r["tokens_per_second"]
            for r in rows.values()
            if (r["family"], r["batch"], r["num_steps"]) == ("eso_b", batch, 0)
        }
        lengths = sorted(cost)
        growth = [
            math.log(cost[b] / cost[a]) / math.log(b / a)
            for a, b in zip(lengths, lengths[1:], strict=False)
        ]
        if growth:
            what = f"eso_b, batch {batch}: steepest growth of a token's cost, as a power of L"
            add(what, max(growth), most=1.0)
    return found


def _limit_ms(row: dict) -> float:
    """The least that a pass could take here: to read what it reads, or its matrix products."""
    return row["ms_per_pass"] * max(row["bandwidth_fraction"], row["flops_fraction"])


def line(name: str, row: dict) -> str:
    about = " (extrapolated)" if row["extrapolated"] else ""
    text = (
        f"{name}: {row['tokens_per_second']:.1f} tokens/s, {row['ms_per_pass']:.2f} ms a pass, "
        f"NFE {row['nfe']}{about}, compiled in {row['compile_seconds']:.0f} s"
    )
    if "published" in row:
        theirs = row["published"]
        text += f"; published {theirs['tokens_per_second']:.1f} tokens/s"
        text += f", {theirs['ms_per_pass']:.2f} ms a pass, NFE {theirs['nfe']:.0f}"
    return text


def _order(row: dict):
    families = list(LABELS)
    return row["length"], row["batch"], families.index(row["family"]), row["num_steps"]


def table(report: dict) -> str:
    """All rows as Markdown, the targets, and how it was measured."""
    names = {id(row): name for name, row in report["rows"].items()}
    rows = sorted(report["rows"].values(), key=_order)
    has_published = any("published" in row for row in rows)
    head = ["L", "batch", "model", "T", "NFE", "tokens/s", "ms/pass", "of bandwidth", "of FLOP/s"]
    if has_published:
        head += ["published tokens/s", "its ms/pass", "ours / published"]
    lines = []
    for row in rows:
        about = "≈ " if row["extrapolated"] else ""
        steps = {0: "one token a pass", row["length"] // 4: "L/4", row["length"]: "L"}
        half = f", α₀ = {row['alpha_0']:g}" if row["alpha_0"] < 1 else ""
        cells = [row["length"], row["batch"], LABELS[row["family"]], steps[row["num_steps"]] + half]
        cells += [
            row["nfe"],
            f"{about}{row['tokens_per_second']:.4g}",
            f"{row['ms_per_pass']:.3g}",
            f"{row['bandwidth_fraction']:.1%}",
            f"{row['flops_fraction']:.1%}",
        ]
        if "published" in row:
            theirs = row["published"]
            about = "≈ " if theirs["extrapolated"] else ""
            cells += [f"{about}{theirs['tokens_per_second']:.4g}", f"{theirs['ms_per_pass']:.3g}"]
            others = published_ratios.SAMPLING.get(names[id(row)], [])
            cells += [published_ratios.text(row["speed_relative_to_published"], others)]
        elif has_published:
            cells += ["–"] * 3
        lines.append(cells)
    parts = [
        _summary(report),
        report_writer.table(head, lines),
        _targets(report),
        _notes(report) + "\n",
    ]
    return "\n".join(parts)


def _summary(report: dict) -> str:
    """The summary above the tables."""
    missed = [t for t in report["targets"] if not t["met"]]
    text = "# Speed of sampling\n\nMade by `python -m benchmarks.sampling`.\n\n"
    text += f"- {len(report['targets']) - len(missed)} of {len(report['targets'])} targets are met"
    text += "; missed:" if missed else "."
    text += "".join(f"\n  - {t['what']}: {t['value']:.2f}" for t in missed)
    pairs, wins = _bd3_against_eso_b(report["rows"])
    if pairs:
        text += (
            "\n- With several tokens a pass (T = L/4), BD3-LM (L′ = 4) yields more tokens/s than "
            f"Eso-LM (B) in {wins} of {pairs} settings."
        )
    if report["published"]:
        text += f"\n- {published_ratios.NOTE}"
    return text + "\n"


def _bd3_against_eso_b(rows: dict) -> tuple[int, int]:
    """Settings at T = L/4 measured for both models, and those where BD3-LM (L′ = 4) is faster."""
    speed = {
        (r["family"], r["batch"], r["length"]): r["tokens_per_second"]
        for r in rows.values()
        if r["num_steps"] == r["length"] // 4 and (r["alpha_0"] == 1 or r["family"] != "eso_b")
    }
    both = [key[1:] for key in speed if key[0] == "eso_b" and ("bd3:4", *key[1:]) in speed]
    return len(both), sum(speed["bd3:4", *key] > speed["eso_b", *key] for key in both)


def _targets(report: dict) -> str:
    lines = []
    for t in report["targets"]:
        aim = f"≥ {t['at_least']:g}" if t["at_most"] is None else f"≤ {t['at_most']:g}"
        limits = [f"{t[of]:.2f}" if of in t else "–" for of in ("possible", "at_both_limits")]
        lines.append([t["what"], aim, f"{t['value']:.2f}", "yes" if t["met"] else "no", *limits])
    head = ["target", "", "measured", "met", "possible", "at both limits"]
    return report_writer.table(head, lines)


def _notes(report: dict) -> str:
    m, s, limits, rows = (report[k] for k in ("machine", "shapes", "limits", "rows"))
    sets = ", or ".join(
        f"{int(size) / 2**20:.0f} MiB: {rate / 1e9:.0f} GB/s"
        for size, rate in limits["bytes_per_second"].items()
    )
    where = m["cpu"] if m["device"] == "cpu" else m["device"]
    parts = [
        f"{s['width']} wide, {s['blocks']} blocks, {s['heads']} heads, vocabulary "
        f"{s['vocab_size']} with the mask, {s['dtype']}, random weights; {where}, {m['threads']} "
        f"CPU threads, jax {m['jax']}"
        + (f", torch {report['published']['torch']}" if report["published"] else "")
        + ".",
        "Medians of 3 to 5 runs, or one run if it is long. Times exclude compilation "
        f"({max(r['compile_seconds'] for r in rows.values()):.0f} s at most) and planning "
        f"({max(r['plan_seconds'] for r in rows.values()):.2f} s at most).",
        "≈: extrapolated from some passes, spread evenly over the generation (for MDLM's large "
        "batches, also from some rows).",
        "Eso-LM (B) over MDLM: with the faster of MDLM's sampler and the forward pass of training.",
        "Bandwidth: bytes of the weights and of the filled part of the cache, relative to the "
        f"bandwidth of this machine for working sets of at most {sets}.",
        "Possible: the ratio if a pass of eso_b took only the time of these reads. At both limits: "
        "the ratio if a pass of either model took only the time of its reads or of its FLOPs, "
        "whichever is longer.",
        "FLOPs: lower bound of a pass, relative to "
        f"{limits['flops_per_second'] / 1e9:.0f} GFLOP/s of a large matrix product.",
        "Other processes kept at most "
        f"{max(r['cores_busy_with_others'] for r in rows.values()):.2f} cores busy.",
    ]
    if report["published"]:
        parts.append(
            "Published code: its own samplers (Eso-LM (B) and AR with KV cache), with one thread "
            "or all threads, whichever is faster."
        )
    commands = dict.fromkeys(row["command"] for row in rows.values())
    notes = "\n".join(f"- {part}" for part in parts)
    return f"{notes}\n\n" + "\n".join(f"    {command}" for command in commands)


def plot(rows: dict, path: pathlib.Path) -> None:
    """Tokens a second against L."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    batches = sorted({row["batch"] for row in rows.values()})
    figure, axes = pyplot.subplots(
        1, len(batches), figsize=(1 + 5 * len(batches), 4.5), layout="constrained", squeeze=False
    )
    for batch, axis in zip(batches, axes[0], strict=True):
        for color, (family, label) in enumerate(LABELS.items()):
            mine = [r for r in rows.values() if (r["family"], r["batch"]) == (family, batch)]
            mine = sorted((r for r in mine if r["alpha_0"] == 1), key=lambda r: r["length"])
            for many, style in ((False, "o-"), (True, "s--")):
                some = [r for r in mine if bool(r["num_steps"]) == many]
                _curve(axis, some, style, f"C{color}", label + (", T = L/4" if many else ""))
            published = [r for r in mine if "published" in r and not r["num_steps"]]
            published = [r["published"] | {"length": r["length"]} for r in published]
            _curve(axis, published, "x:", f"C{color}", f"{label}, published code")
        axis.set(xlabel="L", ylabel="tokens/s", title=f"batch {batch}", yscale="log")
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
    lines = [line for axis in axes[0] for line in axis.get_lines()]
    curves = {line.get_label(): line for line in lines}  # a batch may lack a family
    figure.legend(curves.values(), curves, fontsize=7, loc="outside right center")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _curve(axis, rows: list[dict], style: str, color: str, label: str) -> None:
    if rows:
        points = [(r["length"], r["tokens_per_second"]) for r in rows]
        axis.plot(*zip(*points, strict=True), style, color=color, label=label, markersize=4)
