"""Compares the runs of benchmarks.zeroshot, and writes them as a page."""

from benchmarks import report_writer
from esolm_jax.evaluation.suite import suite_file

GOAL = 1e-6  # relative to the figure
FIGURES = ("nll_per_token", "perplexity", "bits_per_token", "bits_per_byte")
COUNTS = ("num_tokens", "num_samples", "num_orders")


def largest_differences(found: dict, wanted: dict) -> dict:
    """Differences of two reports.

    Returns:
      figures: the largest relative one. errors: the largest one of standard errors, relative to
      nats per token (an error is a difference of figures). other: what must be equal and is not.
    """
    figures, errors, other = [0.0], [0.0], []
    names = [[entry["name"] for entry in report["data_sets"]] for report in (found, wanted)]
    if names[0] != names[1]:
        other.append(f"data sets {names[0]} and {names[1]}")
    for ours, theirs in zip(found["data_sets"], wanted["data_sets"], strict=False):
        bounds = [[r["bound"] for r in entry["results"]] for entry in (ours, theirs)]
        if bounds[0] != bounds[1] or ours["data"] != theirs["data"]:
            other.append(f"{ours['name']}: bounds or data")
        for a, b in zip(ours["results"], theirs["results"], strict=False):
            other += [f"{ours['name']}: {n}" for n in COUNTS if a.get(n) != b.get(n)]
            figures += [_apart(a.get(n), b[n], b[n]) for n in FIGURES if n in b]
            errors += [_apart(a["standard_error"], b["standard_error"], b["nll_per_token"])]
    return {"figures": max(figures), "errors": max(errors), "other": other}


def _apart(a: float | None, b: float | None, scale: float) -> float:
    """|a − b| / |scale|; infinite if one of them is missing."""
    if a is None or b is None:
        return 0.0 if a == b else float("inf")
    return abs(a - b) / abs(scale)


def agrees(row: dict) -> bool:
    """Whether a run has the figures of its reference, and did nothing twice."""
    if row["killed"]:
        first, last = row["kills"]
        titles = {entry["title"] for entry in row["report"]["data_sets"]}
        in_the_middle = 0 < len(last["evaluated"]) < len(titles)
        in_the_middle &= 0 < first["prepared"] < len(titles)
        if not in_the_middle or sorted(row["done_before"]) != last["evaluated"]:
            return False
    elif row["done_before"]:
        return False
    apart = row["differences"]
    return apart is None or (max(apart["figures"], apart["errors"]) <= GOAL and not apart["other"])


def is_right(report: dict) -> bool:
    """Whether every run agrees, every data set was evaluated, and what must be refused was."""
    names = [one.name for one in suite_file.read("zeroshot").data_sets]
    whole = all(
        [entry["name"] for entry in run["report"]["data_sets"]] == names for run in report["runs"]
    )
    refused = report["refused"]
    told = refused is None or (refused["exit_code"] == 2 and "last batch of 1" in str(refused))
    return whole and told and all(run["agrees"] for run in report["runs"])


def brief(report: dict) -> dict:
    """The report with the figures of each data set alone."""
    kept = ("bound", *FIGURES, "standard_error", *COUNTS)
    rows = []
    for run in report["runs"]:
        figures = {
            entry["name"]: [{k: r[k] for k in kept if k in r} for r in entry["results"]]
            for entry in run["report"]["data_sets"]
        }
        rows.append({k: v for k, v in run.items() if k != "report"} | {"figures": figures})
    return report | {"runs": rows}


PAGE = """# The zero-shot suite, run in many ways

Made by `python -m benchmarks.zeroshot` at commit {commit} on {machine}.

{table}
Each row is one run of `evaluate --suite=zeroshot`, in a process of its own, of an Eso-LM (B) with
α₀ = 0.5 (width 32, 2 blocks, L = 64, float32, briefly trained) on invented texts in the published
formats of all {count} data sets (`benchmarks/zeroshot_files.py`). With `--protocol=all` it computes
the NELBO of 2 draws and the importance-weighted bound of 2 orders of every window, with
`--protocol=published` the split NELBO of {windows} windows of each data set.

- Difference: the largest relative one, over all data sets and bounds, of nats per token,
  perplexity, bits per token and bits per byte; of standard errors: relative to the nats per token.
  Goal of both: {goal:g}. Counts of tokens, draws and windows are equal.
- Killed: by SIGKILL, once while data were prepared ({prepared} of {count} data sets were) and once
  while they were evaluated. The next run continues.
- Figures of the published protocol depend on the batch size, so its rows are compared at equal
  batch size. Batches of one window are refused: {refusal}
- 8 devices: data = 4, fsdp = 2. They pad published batches to a multiple of 8 rows. With
  `--protocol=all`, batches of 1 and 3 become batches of 8.

The perplexities of the first run, as an example; they say nothing about the data sets.

{figures}"""


def page(report: dict) -> str:
    rows = []
    for run in report["runs"]:
        cells = [f"`{run['protocol']}`", run["batch_size"], run["devices"]]
        cells += [", ".join(run["done_before"]) if run["killed"] else "–"]
        apart = run["differences"]
        if apart is None:
            cells += ["–", "reference", "reference"]
        else:
            compared = f"batch size {run['reference'].split('-')[1]}, 1 device"
            cells += [compared, f"{apart['figures']:.1e}", f"{apart['errors']:.1e}"]
        rows.append([*cells, f"{run['seconds']:.0f}", "yes" if run["agrees"] else "**NO**"])
    head = "protocol", "batch size", "devices", "killed; done before", "compared with", "difference"
    head += "of standard errors", "seconds", "agrees"
    first = report["runs"][0]["report"]
    figures = [
        [entry["title"], r["bound"], f"{r['perplexity']:.4f}", entry["windows"], r["num_tokens"]]
        for entry in first["data_sets"]
        for r in entry["results"]
    ]
    example = "data set", "bound", "perplexity", "windows", "tokens"
    killed = next(run for run in report["runs"] if run["killed"])
    refused = report["refused"]
    return PAGE.format(
        commit=report_writer.commit(),
        machine=report_writer.machine(),
        table=report_writer.table(head, rows),
        count=len(first["data_sets"]),
        windows=report["published_windows"],
        goal=GOAL,
        prepared=killed["kills"][0]["prepared"],
        refusal=f"`{refused['message']}`" if refused else "not tried.",
        figures=report_writer.table(example, figures),
    )
