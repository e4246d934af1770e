"""The quality of what `sample` has just drawn, as `judge` measures it with its defaults."""

import pathlib
from typing import Any

from ml_collections import ConfigDict

from esolm_jax import results
from esolm_jax.evaluation.protocol import judge_source
from esolm_jax.evaluation.protocol.judge import Judge
from esolm_jax.evaluation.quality import metrics, text_file
from esolm_jax.evaluation.quality.judged import QualitySettings
from esolm_jax.parallel import distributed, sharding


def check(folder: str) -> None:
    """UserError: no judge is in the folder."""
    judge_source.check(folder)


def judge(config: ConfigDict, folder: str, rows: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Writes the figures of the rows of samples.jsonl to `path`, and prints them."""
    texts = text_file.of_samples(str(path.with_name("samples.jsonl")), rows)
    model = Judge(folder, mesh=sharding.make_mesh(config.mesh))
    figures = metrics.judge(texts, model, QualitySettings())
    if distributed.is_main():  # all processes have the same figures
        results.write_json(path, {"texts": texts.name, "judge": folder, **figures})
    for line in metrics.table(figures):
        print(line)
