"""A pretrained GPT-2, Llama, Qwen, LLaDA, Dream or SDAR, annealed into an Eso-LM (B) on your text.

    python -m esolm_jax.convert --from=MODEL --workdir=runs/pretrained
    python -m esolm_jax.prepare --config=configs/pretrained.py:runs/pretrained --workdir=runs/eso \\
        --config.data.train='text/*.jsonl'
    python -m esolm_jax.train --config=configs/pretrained.py:runs/pretrained --workdir=runs/eso \\
        --config.data.train='text/*.jsonl'

MODEL is a folder of the Hugging Face hub: config.json, *.safetensors, tokenizer.json. The argument
after the colon is the workdir that `convert` wrote; its model and tokenizer are unchanged. alpha_0
rises from 0 (left to right, as the pretrained model generates) to 0.5. Hardware: parameters, EMA,
optimizer state and gradients are 20 bytes per parameter. A model of 1 billion fits on one chip of
40 GB; 7 billion need 8 of them.
"""

from esolm_jax.errors import UserError
from esolm_jax.training import checkpoint_meta, checkpoint_steps


def get_config(workdir: str = ""):
    if not workdir:
        raise UserError(
            "--config=configs/pretrained.py:WORKDIR: must name the workdir that `convert` wrote"
        )
    config = checkpoint_meta.saved_config(*checkpoint_steps.split_source(workdir))
    with config.unlocked():
        config.init_from = workdir
        config.objective, config.alpha_0 = "eso_b", 0.5
        config.sample.loop, config.sample.temperature = "auto", 1.0  # not those of LLaDA
        config.model.dtype = "bfloat16"
        config.model.remat = "full"
        config.mesh.data = 1
        config.mesh.fsdp = -1
        # As for fine-tuning: small steps, and an average over less than the whole run.
        config.optimizer.learning_rate = 5e-5
        config.optimizer.b2 = 0.95
        config.optimizer.warmup_steps = 200
        config.optimizer.schedule = "cosine"
        config.optimizer.ema_decay = 0.999
        config.train.batch_size = 128
        config.train.steps = 10_000
        config.train.anneal_steps = 5_000
        config.train.eval_every = 1000
        config.train.checkpoint_every = 1000
    return config
