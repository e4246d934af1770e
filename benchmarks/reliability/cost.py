"""The cost of reliability: the finite check of each step, and the digests of checkpoints."""

import pathlib

COLUMNS = ("what", "without, s", "with, s", "added", "goal")


def run(folder: pathlib.Path, quick: bool) -> list[dict]:
    """Rows with COLUMNS as keys, and the underlying figures."""
    from benchmarks.reliability import digest_cost, step_cost

    rows = []
    for width, blocks, rounds in ((0, 0, 120), (512, 4, 30)):
        rounds = 3 if quick else rounds
        found = step_cost.finite_check_cost(rounds=rounds, width=width, blocks=blocks)
        what = f"finite check, a step of {found['parameters']:,} parameters"
        what += f" ({found['more_memory']:,} bytes more memory)"
        seconds = found["seconds_without"][1], found["seconds_with"][1]
        row = _row(what, *seconds, found["ratio"], "1 %")
        row["added"] += f" ± {100 * found['standard_error']:.2f} %"
        rows.append(row | {"figures": found})
    found = digest_cost.digest_cost(rounds=3 if quick else 21)
    size = f"{found['state_megabytes']:.0f} MB"
    saved, writing = found["save_seconds"]["without"], found["digest_seconds"]
    what = f"digests, time to compute and write them in a save of {size}"
    rows.append(_row(what, saved, saved + writing, writing / saved, "10 %"))
    for name, what, goal in (
        ("save", f"digests, a whole save of {size} (difference of medians)", "10 %"),
        ("save_cpu", f"digests, CPU time of a save of {size}", ""),
        ("restore", f"verification, a restore of {size}", ""),
    ):
        seconds = (found[f"{name}_seconds"][kind] for kind in ("without", "with"))
        rows.append(_row(what, *seconds, found[f"{name}_share"], goal))
    blocked = found["blocked_seconds"]
    share = found["blocked_added_seconds"] / blocked["without"]
    what = f"digests, time that training waits for a save of {size}"
    rows.append(_row(what, blocked["without"], blocked["with"], share, "") | {"figures": found})
    return rows


def _row(what: str, without: float, with_: float, added: float, goal: str) -> dict:
    cells = what, f"{without:.4f}", f"{with_:.4f}", f"{100 * added:+.2f} %", goal
    return dict(zip(COLUMNS, cells, strict=True))
