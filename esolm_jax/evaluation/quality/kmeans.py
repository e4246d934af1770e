"""k-means, and principal components: the clusters of MAUVE. NumPy only."""

import numpy as np

RESTARTS, ITERATIONS = 5, 500  # as in the published implementation of MAUVE


def principal_components(x_PD: np.ndarray, explained: float) -> np.ndarray:
    """Coordinates along the fewest principal components that explain this share of the variance."""
    centered = x_PD - x_PD.mean(axis=0)
    _, singular, directions = np.linalg.svd(centered, full_matrices=False)
    share = np.cumsum(singular**2) / max(np.sum(singular**2), np.finfo(float).tiny)
    count = int(np.searchsorted(share, explained - 1e-12)) + 1
    return centered @ directions[:count].T


def clusters(x_PD: np.ndarray, count: int, seed: int) -> np.ndarray:
    """The cluster of each point, int64 [P]: the best of RESTARTS runs of Lloyd's algorithm."""
    rng = np.random.default_rng(seed)
    runs = [_lloyd(x_PD, _first_centers(x_PD, count, rng)) for _ in range(RESTARTS)]
    return min(runs, key=lambda run: run[1])[0]


def _distances(x_PD: np.ndarray, centers: np.ndarray) -> np.ndarray:
    """Squared distances to each center."""
    squares = (x_PD**2).sum(axis=1)[:, None] + (centers**2).sum(axis=1)[None]
    return np.maximum(squares - 2 * x_PD @ centers.T, 0)


def _first_centers(x_PD: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """k-means++: each next center is a point, with a probability of its squared distance to the
    nearest center."""
    chosen = [int(rng.integers(len(x_PD)))]
    nearest = _distances(x_PD, x_PD[chosen])[:, 0]
    while len(chosen) < count:
        total = nearest.sum()
        p = nearest / total if total > 0 else None
        chosen.append(int(rng.choice(len(x_PD), p=p)))
        nearest = np.minimum(nearest, _distances(x_PD, x_PD[chosen[-1:]])[:, 0])
    return x_PD[chosen]


def _lloyd(x_PD: np.ndarray, centers: np.ndarray) -> tuple[np.ndarray, float]:
    """(the cluster of each point, the sum of squared distances to the centers)."""
    assigned = np.full(len(x_PD), -1)
    for _ in range(ITERATIONS):
        distance = _distances(x_PD, centers)
        before, assigned = assigned, distance.argmin(axis=1)
        if (before == assigned).all():
            break
        sums = np.zeros_like(centers)
        np.add.at(sums, assigned, x_PD)
        sizes = np.bincount(assigned, minlength=len(centers))[:, None]
        centers = np.where(sizes > 0, sums / np.maximum(sizes, 1), centers)
    return assigned, float(distance[np.arange(len(x_PD)), assigned].sum())
