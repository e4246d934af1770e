"""Training: one step, its checkpoints and its metrics.

train_step.py            labels, loss, gradients → weights and EMA
phase_loss.py            the losses of all phases and their gradient, in micro-batches
train_state.py           the state of training and its sharding
optimizer.py             AdamW with clipping, warm-up and EMA
health.py                non-finite steps are undone and counted
checkpoint.py            saves and restores the state of a run
checkpoint_reader.py     verified arrays of a step; it and checkpoint.py alone use Orbax
checkpoint_meta.py       the meta of a checkpoint: its config and its digest
checkpoint_selection.py  reads the newest intact step, or best, or N
checkpoint_steps.py      names of steps; the JSON files in them
checkpoint_digests.py    digests of every file of a step
restore.py               a trained model from a workdir
metrics.py               metrics.jsonl, TensorBoard, progress bar and learning curve
metrics_file.py          the checksummed lines of metrics.jsonl
speed.py                 time, rates and memory of the steps between two logs
profiling.py             an XLA profile of some steps
time_limit.py            ends training before a scheduler would
"""
