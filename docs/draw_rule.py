"""python docs/draw_rule.py: draws docs/rule.png, the one attention rule under each labelling.

The masks are those of the library: labelled by esolm_jax.family, compared by visible().
"""

import pathlib

import matplotlib
import numpy as np

from esolm_jax.family import ar, bd3, eso_a, eso_b, mdlm
from esolm_jax.family.rule import dense_mask

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402
from matplotlib.colors import ListedColormap  # noqa: E402

LENGTH, MASK, START = 6, 99, 98
X = np.arange(LENGTH)[None]
VALID = np.ones((1, LENGTH), bool)
MASKED = np.array([[1, 0, 1, 1, 0, 1]], bool)  # the text's positions 1 and 4 are known
RANDOM = np.array([[4, 1, 3, 0, 5, 2]])  # clean first (random), then masks (random)
LEFT_TO_RIGHT = np.array([[4, 1, 0, 2, 3, 5]])
NATURAL = np.array([[1, 4, 0, 2, 3, 5]])


def panels():
    weight = MASKED.astype(np.float32)
    yield "AR", ar.label(X, VALID, start=START)
    yield "MDLM", mdlm.label(X, VALID, MASKED, weight, mask=MASK)
    yield (
        "Eso-LM (B), diffusion",
        eso_b.label_diffusion(X, VALID, MASKED, RANDOM, weight, mask=MASK),
    )
    yield (
        "Eso-LM (A), diffusion",
        eso_a.label_diffusion(X, VALID, MASKED, RANDOM, weight, mask=MASK),
    )
    yield "BD3-LM, blocks of 2", bd3.label(X, VALID, MASKED, weight, mask=MASK, block_length=2)
    yield (
        "Eso-LM (B), sequential",
        eso_b.label_sequential(X, VALID, MASKED, LEFT_TO_RIGHT, weight, mask=MASK),
    )
    yield (
        "Eso-LM (A), sequential",
        eso_a.label_sequential(X, VALID, MASKED, NATURAL, weight, mask=MASK),
    )


def draw(axes, title, tokens):
    """One panel: rows are queries, columns keys; ticks name the token."""
    in_context = np.asarray(tokens.in_context[0])
    seen = np.asarray(dense_mask(tokens, tokens)[0]).astype(int)
    shade = seen * (1 + in_context[None, :])  # query copies in another colour
    axes.imshow(shade, cmap=ListedColormap(["white", "#e6a157", "#4c78a8"]), vmin=0, vmax=2)
    names = [
        "start" if token == START else f"M$_{position}$" if token == MASK else f"x$_{token}$"
        for token, position in zip(tokens.token[0], tokens.position[0], strict=True)
    ]
    ticks = range(len(names))
    axes.set_xticks(ticks, [f"{n}\n{r}" for n, r in zip(names, tokens.rank[0], strict=True)])
    axes.set_yticks(ticks, names)
    axes.set_xticks(np.arange(len(names) + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(len(names) + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="0.85", linewidth=0.5)
    axes.tick_params(which="both", length=0, labelsize=7)
    axes.set_title(title, fontsize=10)


def main():
    figure, grid = pyplot.subplots(2, 4, figsize=(13, 7), layout="constrained")
    cells = list(grid.flat)
    # one stream above, two streams below; the free cell is the legend
    for axes, (title, labelled) in zip(cells, panels(), strict=False):
        draw(axes, title, labelled.tokens)
    legend = cells[-1]
    legend.axis("off")
    legend.text(
        0,
        0.95,
        "row: query      column: key, its rank below it\n\n"
        "blue: key in context,\n    rank_k + [query is a copy] ≤ rank_q\n\n"
        "orange: key is a query copy,\n    query is one too, and rank_k = rank_q\n\n"
        "x: known token   M: mask\n"
        "subscript: position in the text\n\n"
        "two streams: the query copy first,\n    then the context copy",
        va="top",
        fontsize=10,
    )
    path = pathlib.Path(__file__).with_name("rule.png")
    figure.savefig(path, dpi=110)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
