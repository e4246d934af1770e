"""A toy Eso-LM (B) under the published names, and its tokenizer's files: numpy and JSON alone.

`tests/fixtures/make_ckpt.py` saves it with PyTorch, so that the tests, which have no PyTorch, know
what the committed files hold.
"""

import json
import pathlib

import numpy as np

FOLDER = pathlib.Path(__file__).parents[1] / "fixtures"
VOCAB, WIDTH, COND, BLOCKS, HEADS, LENGTH = 258, 8, 4, 2, 2, 16
STEP = 250
EOS = "<|endoftext|>"

# What a published run's config says; the rest of it does not matter here.
HYPER = {
    "seed": 1,
    "algo": {
        "name": "esolm",
        "backbone": "esolm_dit",
        "time_conditioning": False,
        "alpha_0": 0.25,
        "batch_split": 0.5,
        "diffusion_attn_mode": "causal",
        "sequential_attn_mode": "causal",
        "loss_type": "elbo",
    },
    "model": {
        "type": "ddit",
        "hidden_size": WIDTH,
        "cond_dim": COND,
        "length": LENGTH,
        "n_blocks": BLOCKS,
        "n_heads": HEADS,
        "dropout": 0.1,
    },
    "data": {"train": "openwebtext-train", "tokenizer_name_or_path": "gpt2", "wrap": True},
    "loader": {"global_batch_size": 8, "batch_size": "${div_up:${.global_batch_size}, 4}"},
    "optim": {"lr": 2e-4, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0},
    "training": {"ema": 0.999},
    "trainer": {"max_steps": 250, "gradient_clip_val": 1.0},
}


def shapes(vocab=VOCAB, width=WIDTH, cond=COND, blocks=BLOCKS):
    """Shapes by published name, in the order of the published modules; cond = 0: no adaLN."""
    block = {
        "norm1.weight": (width,),
        "attn_qkv.weight": (3 * width, width),
        "attn_out.weight": (width, width),
        "norm2.weight": (width,),
        "mlp.0.weight": (4 * width, width),
        "mlp.0.bias": (4 * width,),
        "mlp.2.weight": (width, 4 * width),
        "mlp.2.bias": (width,),
    }
    ada = {"adaLN_modulation.weight": (6 * width, cond), "adaLN_modulation.bias": (6 * width,)}
    sigma = {
        "0.weight": (cond, 256),
        "0.bias": (cond,),
        "2.weight": (cond, cond),
        "2.bias": (cond,),
    }
    found = {"vocab_embed.embedding": (vocab, width)}
    found |= {f"sigma_map.mlp.{name}": shape for name, shape in sigma.items() if cond}
    for i in range(blocks):
        found |= {f"blocks.{i}.{n}": s for n, s in (block | (ada if cond else {})).items()}
    found |= {"output_layer.norm_final.weight": (width,)}
    found |= {"output_layer.linear.weight": (vocab, width), "output_layer.linear.bias": (vocab,)}
    if cond:
        found["output_layer.adaLN_modulation.weight"] = (2 * width, cond)
        found["output_layer.adaLN_modulation.bias"] = (2 * width,)
    return found


def weights(seed: int, **sizes) -> dict[str, np.ndarray]:
    """float32 by published name; seed 0: the raw weights of the toy, 1: its EMA."""
    rng = np.random.default_rng(seed)
    return {
        name: rng.normal(0, 0.1, shape).astype(np.float32)
        for name, shape in shapes(**sizes).items()
    }


def byte_alphabet() -> list[str]:
    """GPT-2's 256 characters, one for each byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    other = [byte for byte in range(256) if byte not in plain]
    return [chr(plain_byte) for plain_byte in plain] + [chr(256 + i) for i in range(len(other))]


def write_gpt2(folder: pathlib.Path, merges=()) -> pathlib.Path:
    """vocab.json and merges.txt: the 256 bytes, the merges, and at last <|endoftext|>."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens = [*byte_alphabet(), *("".join(merge) for merge in merges), EOS]
    vocab = {token: i for i, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    return folder


def write_bert(folder: pathlib.Path, size=67, mask=66) -> pathlib.Path:
    """vocab.txt: specials, then letters and their continuations; [MASK] has the id `mask`."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = [chr(ord("a") + i) for i in range(26)]
    words = [*letters, *(f"##{letter}" for letter in letters), *"0123456789.,!?;:"]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words][: size - 1]
    tokens.insert(mask, "[MASK]")
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n")
    return folder
