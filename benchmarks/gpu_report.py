"""The page and the picture of gpu.py."""

import pathlib

import jax

from benchmarks import report_writer


def published_table(found: dict) -> str:
    published = found.get("published")
    if not published:
        return ""
    rows = []
    for name, theirs in published["cases"].items():
        if "error" in theirs:
            what = f"failed: {theirs['error']}"
        elif "ms_per_step" in theirs:
            what = f"{theirs['ms_per_step']:.1f} ms/step"
        else:
            a, b = (theirs[kind]["ms_per_pass"] for kind in ("with sampling", "passes only"))
            what = f"{a:.3f} ms/pass (passes only {b:.3f})"
        ratios = found["cases"].get(name, {}).get("over_published", {})
        rows.append([name, what, ", ".join(f"{r:.2f} ({kind})" for kind, r in ratios.items())])
    text = "The published code on the same device (torch {}), and its time over ours:\n\n{}"
    table = report_writer.table(["case", "published", "published / ours"], rows)
    return text.format(published["about"]["torch"], table)


def page(found: dict) -> str:
    rows = []
    for name, f in found["cases"].items():
        if "error" in f:
            rows.append([name, "failed", f["error"], "", "", ""])
        elif "ms_per_step" in f:
            share = f"{f['share_of_matrix_products']:.0%} of matrix products"
            speed = f"{f['tokens_per_second']:,.0f}"
            rows.append(
                [name, f"{f['ms_per_step']:.1f} ms/step", speed, share, f["goal"], f["met"]]
            )
        else:
            a, b = f["with sampling"], f["passes only"]
            ms = f"{a['ms_per_pass']:.3f} ms/pass (greedy {b['ms_per_pass']:.3f})"
            share = f"{a['share_of_bandwidth']:.0%} of bandwidth"
            speed = f"{a['tokens_per_second']:,.0f}"
            rows.append([name, ms, speed, share, f["goal"], f["met"]])
    head = ["case", "time", "tokens/s", "share", "goal", "met"]
    limits = found["ceilings"]
    what = ", a dry run of tiny models that measures nothing" if found["dry_run"] else ""
    return f"""# Speed on one {found["device"]}{what}

Made by `python -m benchmarks.gpu` (jax {jax.__version__}). Random weights, bfloat16, one token per pass. Matrix products of
8192 x 8192 run at {limits["flops"] / 1e12:.0f} TFLOP/s, a copy moves {limits["bandwidth"] / 1e12:.2f} TB/s. Shares are of these; FLOPs and bytes are lower
bounds from the model's shape.

{report_writer.table(head, rows)}
{published_table(found)}"""  # noqa: E501


def draw(found: dict, path: pathlib.Path) -> None:
    """The share of what the device can do, of each case."""
    import matplotlib.pyplot as plt

    shares = {
        name: f.get("share_of_matrix_products") or f["with sampling"]["share_of_bandwidth"]
        for name, f in found["cases"].items()
        if "error" not in f
    }
    figure, axes = plt.subplots(figsize=(8, 0.45 * len(shares) + 1.5))
    axes.barh(list(shares)[::-1], [100 * share for share in shares.values()][::-1])
    axes.set_xlim(0, 100)
    axes.set_xlabel("% of the device's matrix products (training) or bandwidth (decoding)")
    axes.set_title(found["device"])
    figure.savefig(path, bbox_inches="tight", dpi=120)
    plt.close(figure)
