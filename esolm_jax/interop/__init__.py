"""Weights in and out: other implementations' checkpoints, other runtimes.

    published/   checkpoints of the published implementation ↔ workdirs
    hub/         folders of the Hugging Face hub ↔ workdirs
    torch_file/  reads torch.save files without PyTorch and without unpickling
    export/      StableHLO, ONNX, NumPy and PyTorch artefacts that run without esolm_jax

Shared by them: safetensors files (safetensors_file.py, safetensors_header.py), allowed types of
weights (weight_types.py), tensor names and shapes (fit.py), values in messages (shown.py).
"""
