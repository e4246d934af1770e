"""The quickstart: a small Eso-LM (B) on the plays of Shakespeare.

    bash launch/quickstart.sh

Hardware: a laptop, 2 CPU cores: about 5 minutes. Expected: perplexity (NELBO, alpha_0 = 0.5) 67 to
75 on the test split, where a unigram model has 297, and 65 to 71 on the validation split.
"""

from esolm_jax.config import default_config


def get_config():
    config = default_config()
    config.objective = "eso_b"
    config.alpha_0 = 0.5
    config.data.source = "shakespeare"
    config.data.seq_len = 128
    config.data.vocab_size = 1024
    config.model.width = 128
    config.model.blocks = 4
    config.model.heads = 4
    config.model.dropout = 0.0
    config.model.unroll = 4
    config.train.batch_size = 16
    config.train.steps = 1200
    config.train.log_every = 25
    config.train.eval_every = 200
    config.train.eval_windows = 256
    config.train.checkpoint_every = 200
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 100
    config.optimizer.schedule = "cosine"
    config.optimizer.ema_decay = 0.99
    config.sample.top_p = 0.9
    return config
