"""evaluate --answers=FILE: log-likelihoods of answers to prompts, by the model's own protocol.

A line of FILE is an object with `prompt` and `answer`. Answers of Dream end with EOS. Lines of
answers.jsonl are those of FILE, each with its `log_likelihood`.
"""

import math
import pathlib

import numpy as np

from esolm_jax import results
from esolm_jax.errors import UserError
from esolm_jax.evaluation.masked_likelihood import (
    MaskedLikelihood,
    dream_draws,
    is_pretrained,
    llada_draws,
)
from esolm_jax.evaluation.protocol.multiple_choice import encode_pair
from esolm_jax.family import registry
from esolm_jax.family.family import whole_text
from esolm_jax.files import regular_file
from esolm_jax.parallel import sharding
from esolm_jax.training.restore import TrainedModel

FILE = "answers.jsonl"
_MAX_SIZE = 256 * regular_file.MB


def read(path: pathlib.Path) -> list[dict]:
    """The lines of a file. UserError: one is no object of two texts, or there is none."""
    where = f"--answers={path}"
    text = regular_file.read_text(regular_file.expand(path), _MAX_SIZE, where)
    pairs = [
        _pair(regular_file.parse_json(line, f"{path}:{n}"), f"{path}:{n}")
        for n, line in enumerate(text.split("\n"), 1)
        if line.strip()
    ]
    if not pairs:
        raise UserError(f"{where}: holds no answers")
    return pairs


def _pair(fields, where: str) -> dict:
    names = ("prompt", "answer")
    if not isinstance(fields, dict) or not all(isinstance(fields.get(n), str) for n in names):
        raise UserError(f"{where}: must be an object with the texts `prompt` and `answer`")
    if not fields["answer"]:
        raise UserError(f"{where}: answer='': must not be empty")
    return fields


def score(config, trained: TrainedModel, tokenizer, pairs: list[dict], draws: int) -> list[dict]:
    """The pairs with `log_likelihood`, in nats, and `tokens` of the answer. The draws of a pair
    depend on config.seed only.

    Raises:
      UserError: another family, or a pair is longer than data.seq_len.
    """
    if registry.get(config.objective).rank_span is not whole_text:
        raise UserError(
            f"config.objective={config.objective!r}: must be mdlm or mdlm_shifted for --answers, "
            "because the protocols of LLaDA and Dream mask a text that is read as a whole"
        )
    rows, keeps_mask = config.eval.batch_size, is_pretrained(trained.meta)
    # The draws of figures depend on `rows` alone.
    padded = sharding.padded_rows(trained.built.mesh, rows)
    likelihood = MaskedLikelihood(config, trained.built, trained.params, padded, keeps_mask)
    longest, encoded = config.data.seq_len, []
    for n, pair in enumerate(pairs, 1):
        prompt, answer = encode_pair(tokenizer.encode, pair["prompt"], pair["answer"])
        answer = [*answer, tokenizer.eos_id] if likelihood.is_shifted else answer
        if not answer or len(prompt) + len(answer) > longest:
            raise UserError(
                f"--answers: pair {n}: has {len(prompt)} + {len(answer)} tokens: must be at most "
                f"data.seq_len={longest}, with at least one of the answer"
            )
        encoded.append((prompt, answer))
    found, draw = [], dream_draws if likelihood.is_shifted else llada_draws
    for pair, (prompt, answer) in zip(pairs, encoded, strict=True):
        rng, together = np.random.default_rng(config.seed), math.gcd(draws, rows)
        drawn = draw(rng, len(prompt), len(answer), draws, together)
        value = -float(likelihood.nll([*prompt, *answer], drawn).mean())
        found.append(pair | {"log_likelihood": value, "tokens": len(answer)})
    return found


def write(workdir: pathlib.Path, scored: list[dict]) -> pathlib.Path:
    """Writes answers.jsonl."""
    path = workdir / FILE
    results.write_text(
        path, "".join(results.dumps(row, ensure_ascii=False) + "\n" for row in scored)
    )
    return path
