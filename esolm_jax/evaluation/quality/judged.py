"""Judged: texts as tokens of a judge, and the settings of the metrics."""

import dataclasses
import functools

import numpy as np

from esolm_jax.errors import UserError
from esolm_jax.evaluation.protocol.judge import EOS_TEXT, Judge
from esolm_jax.evaluation.quality.text_file import Texts

VARIANTS = ("per_text", "pooled", "bd3")


@dataclasses.dataclass(frozen=True)
class QualitySettings:
    """Settings of the metrics.

    Attributes:
      variant: of generative perplexity; see perplexity.py.
      max_length: tokens of a text that count; the rest is cut off.
      published_batch_size: texts of a batch of the published variants, which drop those that do not
        fill one. `per_text` has no such batches.
      references: texts to compare with, for MAUVE; None = no MAUVE.
      features: the model whose hidden states MAUVE clusters; None = the judge.
      clusters: of MAUVE; 0 = a tenth of the texts.
      seed: of MAUVE's clusters.
    """

    variant: str = "per_text"
    max_length: int = 1024
    published_batch_size: int = 8
    references: Texts | None = None
    features: Judge | None = None
    clusters: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise UserError(f"variant={self.variant!r}: must be one of {', '.join(VARIANTS)}")
        for name in ("max_length", "published_batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: must be positive")
        if self.clusters == 1 or self.clusters < 0:
            raise UserError(f"clusters={self.clusters}: must be 0 or at least 2")


@dataclasses.dataclass(frozen=True)
class Judged:
    """Texts and their judge.

    Texts are tokenized by the judge; ids without a text are taken as the judge's.
    """

    given: Texts
    judge: Judge
    settings: QualitySettings

    @functools.cached_property
    def spelled(self) -> list[str] | None:
        """The texts, with EOS spelled as the judge reads it."""
        return None if self.given.texts is None else spelled(self.given.texts, self.judge)

    @functools.cached_property
    def whole_ids(self) -> list[list[int]]:
        """The judge's ids of each text. UserError: an id is not in its vocabulary."""
        if self.spelled is not None:
            return self.judge.encode(self.spelled)
        ids = self.given.token_ids or []
        wrong = max((max(row, default=0) for row in ids), default=0)
        if wrong >= self.judge.vocab_size:
            raise UserError(
                f"{self.given.name}: token id {wrong}: must be below the judge's "
                f"{self.judge.vocab_size}; if the ids are of another tokenizer, give texts"
            )
        return ids

    @functools.cached_property
    def ids(self) -> list[list[int]]:
        """`whole_ids`, cut to max_length."""
        return [row[: self.settings.max_length] for row in self.whole_ids]

    @property
    def counts(self) -> dict[str, int]:
        """How many texts there are, were cut, are empty, and do not survive the judge's
        tokenizer."""
        lengths = np.array([len(row) for row in self.whole_ids])
        texts = self.spelled or []
        pairs = zip(texts, self.whole_ids[: len(texts)], strict=True)
        return {
            "num_texts": self.given.count,
            "num_truncated": int((lengths > self.settings.max_length).sum()),
            "num_empty": int((lengths == 0).sum()),
            "num_not_round_trip": sum(self.judge.decode(ids) != text for text, ids in pairs),
        }


def spelled(texts: list[str], judge: Judge) -> list[str]:
    """Texts of `sample`, whose [EOS] becomes the judge's EOS."""
    return [text.replace(EOS_TEXT, judge.eos_text) for text in texts]
