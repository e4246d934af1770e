"""Makes the folders in hf/ beside it, with PyTorch and `transformers`, which the tests lack.

    pip install torch transformers && python tests/data/make_hf.py

Each is a tiny model with random weights as `save_pretrained` writes it (config.json, safetensors),
a toy tokenizer.json, and expected.npz: "tokens" int64 [2, 12] and the "logits" float32 [2, 12, V]
that `transformers` computes of them, and "greedy" int64 [24], how its generate() continues PROMPT,
behind BOS and with the prompt.
"""

import pathlib

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

HERE = pathlib.Path(__file__).parent / "hf"
EOS = "<|endoftext|>"
TOKENS = 60  # of the tokenizer; the models have 64 ids, as the real ones have more than they need
IDS = 64
PROMPT = "he said, the"
SMALL = {
    "vocab_size": IDS,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": TOKENS - 1,
    "eos_token_id": TOKENS - 1,
    "pad_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def make_models():
    """Folder → a model."""
    grouped = SMALL | {"num_key_value_heads": 2}
    gpt2 = transformers.GPT2Config(
        vocab_size=IDS, n_embd=16, n_layer=2, n_head=4, n_positions=32, bos_token_id=TOKENS - 1,
        eos_token_id=TOKENS - 1,
    )  # fmt: skip
    llama = transformers.LlamaConfig(**grouped)
    wide = grouped | {"num_attention_heads": 2, "num_key_value_heads": 1}  # more frequencies
    llama3 = transformers.LlamaConfig(
        **wide, rope_parameters=LLAMA3, tie_word_embeddings=True, rms_norm_eps=1e-5
    )
    qwen2 = transformers.Qwen2Config(**grouped, tie_word_embeddings=True)
    qwen3 = transformers.Qwen3Config(**grouped, head_dim=8)
    return {
        "gpt2": transformers.GPT2LMHeadModel(gpt2),
        "llama": transformers.LlamaForCausalLM(llama),
        "llama3": transformers.LlamaForCausalLM(llama3),
        "qwen2": transformers.Qwen2ForCausalLM(qwen2),
        "qwen3": transformers.Qwen3ForCausalLM(qwen3),
    }


def shake(model) -> None:
    """Every parameter random, biases and norms too, so that none can be left out unseen."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            is_norm = parameter.ndim == 1 and "bias" not in name
            parameter.copy_(1 + 0.3 * noise if is_norm else 0.3 * noise)


def make_tokenizer() -> Tokenizer:
    """Byte-level BPE of 58 bytes, one merge and the token at the end."""
    letters = [chr(ord("A") + i) for i in range(26)] + [chr(ord("a") + i) for i in range(26)]
    tokens = [*letters, "Ġ", ".", ",", "!", "?", "Ċ", "he", EOS]
    assert len(tokens) == TOKENS
    bpe = models.BPE({token: i for i, token in enumerate(tokens)}, [("h", "e")])
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([EOS])
    return tokenizer


def greedy(model, tokenizer: Tokenizer) -> np.ndarray:
    """The likeliest token each time, 24 with the prompt."""
    start = torch.tensor([[TOKENS - 1, *tokenizer.encode(PROMPT).ids]])
    found = model.generate(
        start, attention_mask=torch.ones_like(start), max_length=25, min_length=25, do_sample=False,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return found[0, 1:].numpy()


def main() -> None:
    torch.manual_seed(0)
    for name, model in make_models().items():
        shake(model)
        model.eval()
        folder = HERE / name
        # llama comes in shards.
        model.save_pretrained(folder, max_shard_size="10KB" if name == "llama" else "1GB")
        tokenizer = make_tokenizer()
        tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "generation_config.json").unlink(missing_ok=True)
        tokens = torch.randint(0, IDS, (2, 12))
        tokens[:, 0] = TOKENS - 1  # BOS, which our AR begins with
        with torch.no_grad():
            logits = model(tokens).logits
        np.savez_compressed(
            folder / "expected.npz",
            tokens=tokens.numpy(),
            logits=logits.numpy(),
            greedy=greedy(model, tokenizer),
        )
        print(folder, sorted(path.name for path in folder.iterdir()))


if __name__ == "__main__":
    main()
