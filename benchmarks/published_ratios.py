"""Ratios to the published code's speed, as a range over machines and hours.

A run interleaves our code with the published code, but a ratio still depends on the machine and the
hour. This file lists the ratios of a second machine; ranges begin with the smallest ratio.
"""

# Measured with the same commands on another, quiet machine of the same kind, after the tables.
SAMPLING = {
    "eso_b 1 x 1024, T = L": [3.3],
    "eso_b 8 x 1024, T = L": [2.65],
    "eso_b 1 x 1024, T = 1024, alpha_0 = 0.5": [3.05],
    "eso_b 8 x 1024, T = 1024, alpha_0 = 0.5": [2.45],
}
TRAINING = {"eso_b:0.5": [1.15], "mdlm": [0.84]}
NOTE = (
    "Ours / published: ranges are over two machines of the same kind, smallest ratio first. Single "
    "ratios were measured once, on one machine; their uncertainty is similar."
)


def least(measured: float, others: list[float]) -> float:
    return min([measured, *others])


def text(measured: float, others: list[float]) -> str:
    """ "least–greatest", or a single figure."""
    found = sorted({f"{ratio:.2f}": ratio for ratio in (measured, *others)}.items(), key=_ratio)
    return "–".join(dict.fromkeys((found[0][0], found[-1][0])))


def _ratio(item: tuple[str, float]) -> float:
    return item[1]
