"""Validation by the published BD3-LM code, on request: as published_validation.py.

    python published_validation_bd3.py DIR < REQUEST

DIR is a checkout of the published BD3-LM code, whose `main._train` and `main._ppl_eval` run as they
are, with its own attention in PyTorch (`attn_backend=sdpa`). Besides what published_validation.py
replaces: the checkpoint is loaded on the CPU, and documents are cut by one process.
"""

import functools
from unittest import mock

import published_validation


def _note_bd3(batch, arguments, result) -> None:
    """BD3-LM's loss is of each token, and says what counts."""
    del arguments
    batch |= {"loss": float(result.loss), "nll": float(result.nlls.sum())}
    batch["diffusion_nll"] = published_validation.array(result.nlls)
    batch["tokens"] = int(result.token_mask.sum())


class PublishedBd3(published_validation.Published):
    """The published BD3-LM modules."""

    def install(self) -> None:
        import diffusion

        self.diffusion = diffusion
        record = self.recorder.wrap
        record(diffusion.Diffusion, "_loss", _note_bd3)
        record(diffusion.Diffusion, "q_xt", published_validation.note_as("xt"))
        record(diffusion.Diffusion, "_sample_t", published_validation.note_as("t"))
        make = self.dataloader.get_dataset
        self.dataloader.get_dataset = functools.partial(make, num_proc=1)
        self.main._load_from_checkpoint = self._load

    def _load(self, config, tokenizer):
        return self.diffusion.Diffusion.load_from_checkpoint(
            config.eval.checkpoint_path,
            tokenizer=tokenizer,
            config=config,
            strict=False,
            weights_only=False,
        )

    def run_train(self, arguments: dict, seed: int) -> None:
        kind = self.diffusion.Diffusion
        made = published_validation.with_random_weights(kind, seed)
        with mock.patch.object(self.diffusion, "Diffusion", made):
            self.main._train(**arguments)

    def run_evaluate(self, arguments: dict) -> None:
        self.main._ppl_eval(**arguments)


if __name__ == "__main__":
    published_validation.run(PublishedBd3)
