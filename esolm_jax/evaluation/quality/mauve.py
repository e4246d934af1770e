"""MAUVE (Pillutla et al., arXiv 2102.01454): how close the texts are to reference texts.

Both sets are embedded by a model (the hidden state of the last token), normalized, reduced to
principal components that explain 90 % of the variance, and clustered together by k-means. MAUVE is
the area under the curve of (exp(−c KL(q‖r)), exp(−c KL(p‖r))) over mixtures r of the histograms p
and q of the clusters, with c = 5. 1 = the same histograms.

A MAUVE is *approximate*: it depends on the features, the number of texts and clusters, and the
seed, all of which the figures name. The published tables of Eso-LM use ModernBERT in a private
fork and unpublished references, so theirs cannot be reproduced. Compare figures of one setting.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from esolm_jax.errors import UserError
from esolm_jax.evaluation.protocol.judge import Judge
from esolm_jax.evaluation.quality import kmeans
from esolm_jax.evaluation.quality.judged import Judged, spelled
from esolm_jax.evaluation.quality.text_file import Texts

NAME = "mauve"
SCALE, MIXTURES, EXPLAINED = 5.0, 25, 0.9  # as published


def applies(judged: Judged) -> bool:
    return judged.settings.references is not None


def _features(texts: Texts, judge: Judge, max_length: int) -> np.ndarray:
    """float32 [n, D] of the texts that are not empty."""
    if texts.texts is None:
        raise UserError(f"{texts.name}: MAUVE needs the field text, not only token_ids")
    most = min(max_length, judge.feature_length)
    rows = [row[:most] for row in judge.encode(spelled(texts.texts, judge)) if row]
    if len(rows) < 2:
        raise UserError(f"{texts.name}: MAUVE needs at least 2 texts that are not empty")
    return judge.features(rows)


def _divergence(p: np.ndarray, r: np.ndarray) -> float:
    """KL(p‖r), for r > 0 where p > 0."""
    seen = p > 0
    return float((p[seen] * np.log(p[seen] / r[seen])).sum())


def of_histograms(p: np.ndarray, q: np.ndarray) -> float:
    """MAUVE of two distributions over the same clusters."""
    weights = np.linspace(1e-6, 1 - 1e-6, MIXTURES)
    curve = [(0.0, np.inf)]
    for w in weights:
        r = w * p + (1 - w) * q
        curve.append((_divergence(q, r), _divergence(p, r)))
    curve.append((np.inf, 0.0))
    x, y = np.exp(-SCALE * np.array(curve)).T  # x falls from 1 to 0, y rises from 0 to 1
    return float(np.trapezoid(y[::-1], x[::-1]))


def of_features(sides: Sequence[np.ndarray], count: int, seed: int) -> float:
    """MAUVE of two sets of features, float [n, D] each, in `count` clusters."""
    whole = np.concatenate(sides).astype(np.float64)
    whole /= np.linalg.norm(whole, axis=1, keepdims=True)
    points = kmeans.principal_components(whole, EXPLAINED)
    label = kmeans.clusters(points, count, seed)
    parts = np.split(label, [len(sides[0])])
    p, q = (np.bincount(part, minlength=count) / len(part) for part in parts)
    return of_histograms(p, q)


def default_clusters(sizes: Sequence[int]) -> int:
    """A tenth of the smaller set."""
    return max(2, round(min(sizes) / 10))


def compute(judged: Judged) -> dict[str, Any]:
    s = judged.settings
    assert s.references is not None
    model = s.features or judged.judge
    sides = [_features(texts, model, s.max_length) for texts in (judged.given, s.references)]
    sizes = [len(side) for side in sides]
    count = s.clusters or default_clusters(sizes)
    if count > sum(sizes):
        raise UserError(f"clusters={count}: must be at most {sum(sizes)}, the number of texts")
    return {
        "mauve": of_features(sides, count, s.seed),
        "approximate": True,
        "num_texts": sizes[0],
        "num_references": sizes[1],
        "references": s.references.name,
        "clusters": count,
        "max_length": min(s.max_length, model.feature_length),
        "seed": s.seed,
    }


def line(figures: dict[str, Any]) -> str:
    return (
        f"{figures['mauve']:.4f} (approximate), {figures['num_texts']} texts against "
        f"{figures['num_references']} references, {figures['clusters']} clusters"
    )
