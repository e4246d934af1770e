"""Quality of generated texts under a judge: what `python -m esolm_jax.judge` computes.

text_file.py   reads JSONL of texts or token ids
of_samples.py  the texts that `sample` has just drawn
judged.py      Judged: texts as tokens of the judge, and the settings of the metrics
metrics.py     the metrics by name, and judge(): all figures of a list of texts
perplexity.py  generative perplexity: per_text, and the published pooled and bd3
diversity.py   entropy, distinct-n, repetition
mauve.py       MAUVE against reference texts; kmeans.py: its clusters
"""
