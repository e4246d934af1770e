"""The public Python API: a trained model with logits, sample and log_likelihood.

    model = esolm_jax.load("runs/quickstart")
    model.sample("Shall I compare thee", seed=1)

Results equal those of the verbs `sample` and `evaluate`. See docs/python_api.md.
"""

import functools
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from esolm_jax import config as config_lib
from esolm_jax import memory_limit
from esolm_jax.config import Setting
from esolm_jax.data.tokenizer import Tokenizer
from esolm_jax.errors import UserError
from esolm_jax.evaluation import known_tokens, sampler_likelihood, text_likelihood
from esolm_jax.evaluation.sampler_likelihood import SamplerLikelihood
from esolm_jax.evaluation.text_likelihood import LogLikelihood, TextLikelihood
from esolm_jax.family.labels import Tokens
from esolm_jax.interop.published import names as published_names
from esolm_jax.interop.published.names import PublishedModel
from esolm_jax.parallel import multihost, sharding
from esolm_jax.sampling import texts as texts_lib
from esolm_jax.sampling.engine import network
from esolm_jax.sampling.generate import Generator, check
from esolm_jax.sampling.loops.loop import Ends
from esolm_jax.sampling.plan import prompts as prompts_lib
from esolm_jax.training import checkpoint_meta, checkpoint_steps, restore


class LanguageModel:
    """A trained model and its tokenizer, placed on a device mesh. Made by `load`.

    Attributes:
      config: the run's config with the overrides of `load`, locked.
      tokenizer: encode(str) → ids, decode(ids) → str, mask_id, bos_id, eos_id, vocab_size.
      step: the training step of the checkpoint.
      params: the weights, as in model.transformer.init.
    """

    def __init__(self, config: ConfigDict, trained: restore.TrainedModel, tokenizer: Tokenizer):
        self.config = config
        self.tokenizer = tokenizer
        self.step = trained.step
        self.params = trained.params
        self._built = trained.built
        self._apply = jax.jit(trained.built.apply)
        self._networks: dict[str, network.Network] = {}

    @property
    def mask_id(self) -> int:
        """The id that stands for a token to be predicted."""
        return self._built.special.mask

    def logits(
        self,
        tokens: Tokens | np.ndarray | Sequence[Sequence[int]],
        position: Any = None,
        rank: Any = None,
        in_context: Any = None,
    ) -> jax.Array:
        """The model's logits; the mask token is not excluded.

        Args:
          tokens: Tokens of family/labels.py, each with four labels; or their ids, int [B, T], with
            the other three labels as arguments (int, int, bool; [B, T]); or the ids alone, int
            [B, L], `mask_id` where unknown. Ids alone are labelled as in the first step of
            left-to-right sampling: unknown tokens are masks that come last in the order. (mdlm,
            mdlm_shifted and bd3 have no order within a rank.)

        Returns:
          float32 [B, T, V]. For ids alone, [b, i] predicts the token at position i of text b; of
          mdlm_shifted, the token at position i + 1.

        Raises:
          UserError: B is not a multiple of the devices that rows are split over; of ids alone, one
            is not in the vocabulary, a text of eso_a or eso_b has no mask, or the known tokens of
            an ar text are not at the start.
        """
        if isinstance(tokens, Tokens) or position is not None:
            labelled = published_names.as_tokens(tokens, position, rank, in_context)
            return self._run(labelled)
        labelled = known_tokens.label(self.config, self._built, np.asarray(tokens))
        by_rank = self._run(labelled)
        inverse = np.argsort(np.asarray(labelled.position), axis=1)
        return jnp.take_along_axis(by_rank, inverse[..., None], axis=1)

    def _run(self, tokens: Tokens) -> jax.Array:
        rows, shards = tokens.token.shape[0], sharding.num_row_shards(self._built.mesh)
        if rows % shards:
            raise UserError(
                f"tokens: {rows} rows: must be a multiple of mesh.data x mesh.fsdp = {shards}"
            )
        return self._apply(self.params, tokens)

    def sample(self, prompts: str | Sequence[str] = (), **settings: Setting) -> list[str]:
        """Texts, as `python -m esolm_jax.sample` makes them from the same prompts and settings.

        Args:
          prompts: each is continued, or filled in where it has [MASK] or [MASK:n]; without prompts,
            texts are unconditional.
          settings: fields of config.sample, such as seed=1, num_texts=4, steps=32, temperature=0.8,
            top_p=0.9, length=256.

        Returns:
          config.sample.num_texts texts for each prompt, in the order of the prompts.

        Raises:
          UserError: an unknown setting, a bad value, a prompt that does not fit or that the family
            cannot fill in, or texts that do not fit into memory.
        """
        fields = {f"sample.{name}": value for name, value in settings.items()}
        config = config_lib.overridden(self.config, fields)
        check(config)
        given = [prompts] if isinstance(prompts, str) else list(prompts)
        length = texts_lib.length_of(config)
        parsed = prompts_lib.bounded(
            prompts_lib.parse_text(text, self.tokenizer, name=f"prompts[{i}]", length=length)
            for i, text in enumerate(given)
        )
        mesh, special = self._built.mesh, self._built.special
        memory_limit.check_sampling_fits(config, self.tokenizer, parsed, mesh)
        canvas = texts_lib.make_canvas(config, parsed, special, self._built.model.vocab_size)
        ends = Ends(self.tokenizer.eos_id, self.tokenizer.eot_id)
        generator = Generator.of(config, canvas, special, mesh=mesh, ends=ends)
        decoded = generator.run(self._network(config.sample.weight_dtype))
        rows = texts_lib.sample_rows(
            config, generator, multihost.to_host(decoded), self.tokenizer, prompted=bool(parsed)
        )
        return [row["text"] for row in rows]

    def _network(self, dtype: str) -> network.Network:
        if dtype not in self._networks:
            folded = network.fold(self._built.model, self.params, self._built.mesh, dtype=dtype)
            self._networks = {dtype: folded}  # one at a time
        return self._networks[dtype]

    def log_likelihood(
        self,
        texts: str | Sequence[str],
        *,
        num_samples: int | None = None,
        num_orders: int = 0,
        seed: int | None = None,
    ) -> LogLikelihood:
        """Log-likelihoods of texts, by the estimators of `python -m esolm_jax.evaluate`.

        Each text is one window, closed by EOS, as `prepare` packs it with data.packing=pad.

        Args:
          num_samples: draws of noise per text, for the NELBO; by default config.eval.num_samples.
          num_orders: K > 0 = the importance-weighted bound of K orders, not the NELBO (eso_b).
          seed: seed of the draws, by default config.seed; draws also depend on the batch of
            config.eval.batch_size texts.

        Raises:
          UserError: no texts, a text longer than data.seq_len, or a bound that the family lacks.
        """
        changes: dict[str, Setting] = {"eval.num_orders": num_orders}
        if num_samples is not None:
            changes["eval.num_samples"] = num_samples
        if seed is not None:
            changes["seed"] = seed
        rows = [texts] if isinstance(texts, str) else list(texts)
        return self._likelihood.estimate(self.params, rows, changes)

    def sampler_log_likelihood(
        self,
        texts: str | Sequence[str] | Sequence[Sequence[int]],
        *,
        num_orders: int = 0,
        **settings: Setting,
    ) -> LogLikelihood:
        """Log-probabilities with which `sample` with these settings draws texts, when it is asked
        for texts of their numbers of tokens.

        Args:
          texts: strings, without an EOS at the end, or token ids, such as those in samples.jsonl.
          num_orders: K > 0: orders of the bound, needed if the sampler draws its order
            (evaluation/sampler_likelihood.py); 0 = exact.
          settings: fields of config.sample, as of `sample`.

        Raises:
          UserError: no likelihood exists (the sampler draws its order and num_orders is 0, or
            stop_at_eos), a setting is wrong, or a text does not fit.
        """
        fields = {f"sample.{name}": value for name, value in settings.items()}
        config = config_lib.overridden(self.config, fields)
        sampler_likelihood.check(config, num_orders)
        folded = self._network(config.sample.weight_dtype)
        scorer = SamplerLikelihood(config, self._built, self.params, folded)
        return text_likelihood.of_sampler(scorer, self.tokenizer, texts, num_orders)

    @functools.cached_property
    def _likelihood(self) -> TextLikelihood:
        return TextLikelihood(self.config, self._built, self.tokenizer)


def load(
    workdir: str | os.PathLike[str],
    *,
    step: int | str = checkpoint_steps.LATEST,
    weights: str = "ema",
    overrides: Mapping[str, Setting] | None = None,
) -> LanguageModel:
    """The trained model in a workdir of `train` or `convert`.

    Args:
      step: a number, "latest" or "best" (the lowest validation NELBO).
      weights: "ema" or "raw".
      overrides: dotted config fields, such as {"alpha_0": 1.0, "mesh.devices": 1}.

    Raises:
      UserError: no checkpoint is intact, it was trained with other sizes than the overrides, or a
        field or value is not allowed.
    """
    checkpoint_steps.check_selector(str(step), f"step={step!r}")
    if weights not in ("ema", "raw"):
        raise UserError(f"weights={weights!r}: must be ema or raw")
    folder = pathlib.Path(workdir).expanduser()
    config = config_lib.overridden(checkpoint_meta.saved_config(folder, str(step)), overrides or {})
    mesh = sharding.make_mesh(config.mesh)
    trained = restore.load_trained(config, folder, weights, mesh, str(step))
    return LanguageModel(config, trained, restore.load_tokenizer(folder, trained.meta))


def load_published(
    weights: Mapping[str, np.ndarray], num_heads: int, mask_id: int | None = None
) -> PublishedModel:
    """A model from weights of the published implementation, without a config or a tokenizer.

    Args:
      weights: published parameter name → array, with or without the prefix `backbone.`.
      mask_id: by default the last id of the vocabulary.

    Returns:
      A PublishedModel, with logits(tokens) as LanguageModel has it for labelled tokens, and
      sample(order, step_sizes, rng=…), which returns token ids. To sample from prompts, turn the
      file into a workdir with `python -m esolm_jax.convert`.

    Raises:
      UserError: tensors are missing, left over, of a wrong shape, or not finite.
    """
    return published_names.load(weights, num_heads, mask_id)
