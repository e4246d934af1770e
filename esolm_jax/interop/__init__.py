"""Weights in and out: other implementations' checkpoints, other runtimes.

    published/   checkpoints of the published implementation ↔ workdirs
    hub/         pretrained GPT-2, Llama and Qwen folders ↔ workdirs
    torch_file/  reads torch.save files without PyTorch and without unpickling
    export/      StableHLO, ONNX and NumPy artefacts that run without esolm_jax

Shared by them: safetensors files (safetensors_file.py, safetensors_header.py), allowed types of
weights (weight_types.py), tensor names and shapes (fit.py), values in messages (shown.py).
"""
