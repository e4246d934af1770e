"""EsolmLM: the model "esolm" of lm_eval, a trained model of a workdir.

    import lm_eval
    from esolm_jax.harness.adapter import EsolmLM
    lm_eval.simple_evaluate(model=EsolmLM("runs/owt"), tasks=["lambada_openai"])

No result depends on the batch: rows are padded to lengths of their own and scored with a fixed
number of rows, and draws follow from the ids of a request.

In several processes (distributed.start) all make the same calls with the same requests. Each pass
runs on the devices of all processes, and each process has all results.
"""

import dataclasses
import functools
import hashlib
import pathlib
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from esolm_jax import config as config_lib
from esolm_jax.data import chat_template as chat_lib
from esolm_jax.errors import UserError, nearest
from esolm_jax.evaluation.answer_likelihood import (
    LEFT_TO_RIGHT,
    AnswerLikelihood,
    Pair,
    rolling_windows,
)
from esolm_jax.evaluation.masked_likelihood import MaskedLikelihood, is_pretrained
from esolm_jax.evaluation.protocol.multiple_choice import encode_pair
from esolm_jax.harness.protocols import EXTRA_TOKENS, MONTE_CARLO, MonteCarlo
from esolm_jax.language_model import LanguageModel
from esolm_jax.parallel import multihost, sharding
from esolm_jax.sampling.generate import Generator
from esolm_jax.sampling.loops.loop import Ends
from esolm_jax.sampling.plan.canvas import MASK, Canvas, Seed
from esolm_jax.training import checkpoint_meta, checkpoint_steps, restore

PROTOCOLS = ("exact", *MONTE_CARLO)


@dataclasses.dataclass(frozen=True)
class HarnessSettings:
    """Arguments of the model "esolm" besides the workdir.

    Attributes:
      protocol: exact, llada, duo_full or duo_suffix; see protocols.py. It scores `loglikelihood`;
        rolling likelihoods are always exact.
      batch_size: rows of a forward pass, rounded up to the devices that rows are split over; no
        result depends on it.
      step, weights: of the checkpoint, as of esolm_jax.load.
      num_orders: K > 0: the bound of K orders of the answer, with protocol exact (eso_b).
      draws, cfg: of the Monte-Carlo protocols; 0 draws = as published.
      seed: of orders, draws and sampled texts.
    """

    protocol: str = "exact"
    batch_size: int | str = 8
    step: int | str = checkpoint_steps.LATEST
    weights: str = "ema"
    num_orders: int = 0
    draws: int = 0
    cfg: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.protocol not in PROTOCOLS:
            allowed = f"must be one of {', '.join(PROTOCOLS)}{nearest(self.protocol, PROTOCOLS)}"
            raise UserError(f"protocol={self.protocol}: {allowed}")
        if not str(self.batch_size).isdigit():
            raise UserError(f"batch_size={self.batch_size}: must be a number")
        if self.draws < 0:
            raise UserError(f"draws={self.draws}: must be at least 0")
        if self.num_orders and self.protocol != "exact":
            raise UserError(
                f"num_orders={self.num_orders}: must be 0 with protocol={self.protocol}"
            )

    @classmethod
    def of(cls, given: dict[str, Any]) -> "HarnessSettings":
        """Without what lm_eval passes to every model. UserError: an unknown argument."""
        names = {field.name for field in dataclasses.fields(cls)}
        given = {k: v for k, v in given.items() if k not in ("device", "max_batch_size")}
        if unknown := sorted(given.keys() - names):
            raise UserError(f"{unknown[0]}: unknown argument{nearest(unknown[0], names)}")
        return cls(**given)


@register_model("esolm")
class EsolmLM(LM):
    """A trained model for lm_eval.simple_evaluate(model=EsolmLM(…)) or model="esolm"."""

    def __init__(self, workdir: str | pathlib.Path, **settings: Any):
        """Loads the model.

        Args:
          settings: see HarnessSettings; and fields of config.mesh, such as "mesh.devices".

        Raises:
          UserError: a wrong argument, or a workdir without an intact checkpoint.
        """
        super().__init__()
        on_mesh = {name: settings.pop(name) for name in [*settings] if name.startswith("mesh.")}
        s = HarnessSettings.of(settings)
        folder = pathlib.Path(workdir).expanduser()
        saved = checkpoint_meta.saved_config(folder, str(s.step))
        config = config_lib.overridden(saved, on_mesh)
        mesh = sharding.make_mesh(config.mesh)
        size = sharding.padded_rows(mesh, int(s.batch_size))
        trained = restore.load_trained(config, folder, s.weights, mesh, str(s.step))
        built, tokenizer = trained.built, restore.load_tokenizer(folder, trained.meta)
        self.settings = s
        self._chat, self._template = chat_lib.of_tokenizer(tokenizer), ""
        self.model = LanguageModel(config, trained, tokenizer)
        self.exact = AnswerLikelihood(config, built, trained.params, size, s.num_orders, s.seed)
        masked = MaskedLikelihood(
            config, built, trained.params, size, keeps_mask=is_pretrained(trained.meta), cfg=s.cfg
        )
        self._monte_carlo = MonteCarlo(masked, tokenizer, s.draws, s.seed)

    @property
    def tokenizer_name(self) -> str:
        """Identifies the tokenizer and its chat template in caches of requests."""
        name = self.model.tokenizer.fingerprint
        if self._chat is None:
            return name
        templates = repr(sorted(self._chat.templates.items())).encode()
        return f"{name}-{hashlib.sha256(templates).hexdigest()[:12]}"

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The chat template, of this name if it is one; apply_chat_template then uses it."""
        self._template = chat_template if isinstance(chat_template, str) else ""
        return self._needed_chat().source(self._template)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The text of a chat. UserError: the model has no chat template, or it refuses the chat."""
        return self._needed_chat().render(
            chat_history, add_generation_prompt=add_generation_prompt, name=self._template
        )

    def _needed_chat(self) -> chat_lib.ChatTemplate:
        if self._chat is None:
            raise UserError(
                "apply_chat_template: must be off, because the model's tokenizer came without a "
                "chat template"
            )
        return self._chat

    @functools.cached_property
    def _encode(self) -> Callable[[str], list[int]]:
        """Text → ids. A tokenizer with a chat template recognizes special tokens in text."""
        tokenizer = self.model.tokenizer
        if self._chat is None:
            return tokenizer.encode
        library = tokenizer.recognizing()
        return lambda text: library.encode(text, add_special_tokens=False).ids

    @property
    def max_length(self) -> int:
        """Tokens of a prompt and its answer."""
        return self.exact.max_length - EXTRA_TOKENS.get(self.settings.protocol, 0)

    def _pair(self, context: str, continuation: str) -> Pair:
        """Prompts that are too long lose their beginning. UserError: an answer is too long."""
        prompt, answer = encode_pair(self._encode, context, continuation)
        room = self.max_length - len(answer)
        if room < 0:
            raise UserError(
                f"an answer has {len(answer)} tokens; must have at most {self.max_length}: "
                f"{continuation[:40]!r}"
            )
        return Pair(prompt[max(0, len(prompt) - room) :], answer)

    def loglikelihood(self, requests: list, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(score of the continuation, is_greedy) of each (context, continuation)."""
        del disable_tqdm
        multihost.check_same_value("requests", [request.args for request in requests])
        pairs = [self._pair(*request.args) for request in requests]
        if self.settings.protocol == "exact":
            found = self.exact.score(pairs)
        else:
            score = MONTE_CARLO[self.settings.protocol]
            found = [score(self._monte_carlo, p) if p.answer else (0.0, True) for p in pairs]
        for request, result in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, result)
        return found

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        """Exact log p of each (text,), in windows that score each token once."""
        del disable_tqdm
        multihost.check_same_value("requests", [request.args for request in requests])
        pairs, owner = [], []
        for number, request in enumerate(requests):
            ids = self._encode(request.args[0])
            for start, new, end in rolling_windows(len(ids), self.exact.max_length):
                pairs.append(Pair(ids[start:new], ids[new:end]))
                owner.append(number)
        totals = np.zeros(len(requests))
        np.add.at(totals, owner, [value for value, _ in self.exact.score(pairs)])
        for request, total in zip(requests, totals.tolist(), strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals.tolist()

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        """Texts from left to right, up to a stop string or EOS: greedy unless do_sample."""
        del disable_tqdm
        multihost.check_same_value("requests", [request.args for request in requests])
        found = []
        for request in requests:
            text = self._generate(*request.args)
            self.cache_hook.add_partial("generate_until", request.args, text)
            found.append(text)
        return found

    def _generate(self, context: str, settings: dict[str, Any]) -> str:
        until = settings.get("until", [])
        until = [until] if isinstance(until, str) else list(until)
        if self._chat is not None:
            until.append(self._chat.end_of_turn(self._template))
        most = int(settings.get("max_gen_toks", 256))
        if not 0 < most < self.exact.max_length:
            raise UserError(
                f"max_gen_toks={most}: must be in [1, {self.exact.max_length}), below data.seq_len"
            )
        temperature = float(settings.get("temperature", 1.0)) if settings.get("do_sample") else 0.0
        prompt = self._encode(context)[-(self.exact.max_length - most) :]
        ids = self._continue(prompt, most, temperature)
        text = self.model.tokenizer.decode(ids)
        ends = [text.find(stop) for stop in until if stop and stop in text]
        return text[: min(ends)] if ends else text

    def _continue(self, prompt: Sequence[int], most: int, temperature: float) -> list[int]:
        """Ids behind the prompt, up to EOS."""
        built, tokenizer = self.exact.built, self.model.tokenizer
        changes = {"sample.temperature": temperature, "sample.stop_at_eos": True}
        config = config_lib.overridden(self.model.config, LEFT_TO_RIGHT | changes)
        seed = Seed(self.settings.seed, zlib.crc32(np.array(prompt, np.int64)))
        shards = sharding.num_row_shards(built.mesh)
        rows = [[*prompt, *[MASK] * most]] * shards  # a row for each device
        sizes = {"vocab_size": built.model.vocab_size, "mask_id": built.special.mask}
        canvas = Canvas.of(rows, [seed] * len(rows), **sizes)
        ends = Ends(tokenizer.eos_id, tokenizer.eot_id)
        generator = Generator.of(config, canvas, built.special, mesh=built.mesh, ends=ends)
        decoded = generator.run(self.exact.network)
        text, eos_position = multihost.to_host((decoded.text, decoded.eos_position))
        end = min(int(eos_position[0]), len(rows[0]))
        return text[0, len(prompt) : end].tolist()
