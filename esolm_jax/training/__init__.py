"""Training: one step, its checkpoints and its metrics.

train_step.py          losses of all phases → gradients → weights and EMA
optimizer.py           AdamW with clipping, warm-up and EMA
health.py              non-finite steps are undone and counted
checkpoint.py          reads and writes checkpoints (the only module that uses Orbax)
checkpoint_digests.py  digests of every file of a step
checkpoint_steps.py    selects the newest intact step, or best, or N
restore.py             a trained model from a workdir
metrics.py             metrics.jsonl, TensorBoard, progress bar and learning curve
metrics_file.py        the checksummed lines of metrics.jsonl
"""
