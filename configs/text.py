"""Your own text, with the quickstart's model: files, directories or globs of .txt, .jsonl, .gz.

    python -m esolm_jax.prepare --config=configs/text.py --workdir=runs/mine \\
        --config.data.train='corpus/*.txt'
    python -m esolm_jax.train --config=configs/text.py --workdir=runs/mine

Without --config.data.validation and --config.data.test, 5 % of the documents are held out for
each; at least one of them, or a part of one. Hardware: any laptop. Expected: depends on the text;
`evaluate` prints the perplexity and that of a unigram model.
"""

from configs import shakespeare


def get_config():
    config = shakespeare.get_config()
    with config.unlocked():
        config.data.source = "text"
    return config
