"""The model card (README.md) of a folder that `export --to=hub` wrote."""

import pathlib
from typing import Any

from esolm_jax.errors import UserError
from esolm_jax.files import regular_file

FILE = "README.md"
_SIZE = 16 * regular_file.MB
_HEAD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- esolm_jax
- {objective}
---

# {title}

| | |
|---|---|
"""
_ESOLM = """
## Use

```python
from transformers import AutoModelForMaskedLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER", trust_remote_code=True)
model = AutoModelForMaskedLM.from_pretrained("FOLDER", trust_remote_code=True)
ids = tokenizer("The [MASK] of", return_tensors="pt").input_ids
logits = model(ids).logits               # [b, i] predicts the token at position i
texts = model.generate(ids, length={length}, seed=0)
print(tokenizer.batch_decode(texts, skip_special_tokens=True))
```

`generate` takes `num_texts`, `length`, `seed`, `alpha_0`, `schedule`, `steps`, `block_length`,
`temperature`, `top_k` and `top_p`; `sampling` of `config.json` has the defaults. The draws of a
seed are those of `python -m esolm_jax.sample`. `python check_esolm.py` compares logits and texts of
this folder with those of the original in `expected.npz`. To convert the folder back:
`python -m esolm_jax.convert --from=FOLDER --workdir=DIR`.
"""
_PLAIN = """
## Use

A plain {kind} folder: `AutoModelForCausalLM.from_pretrained("FOLDER")`, `vllm serve FOLDER`, or
`convert_hf_to_gguf.py FOLDER` of llama.cpp.
"""
_MASKED = """
The model is an Eso-LM at alpha_0 = 0. The logits of the next token are those at a `[MASK]` behind
the text. The `[MASK]` must leave the cache before the next step, so the generation loops of vLLM
and llama.cpp do not apply; they load and score. Greedy generation with `transformers`:

```python
cache, new = DynamicCache(), ids                     # ids [1, n]
for _ in range(32):
    mask = torch.full((1, 1), tokenizer.mask_token_id)
    out = model(torch.cat([new, mask], dim=1), past_key_values=cache)
    cache.crop(-1)                                   # without the mask
    logits = out.logits[:, -1].index_fill(1, mask[0], float("-inf"))
    new = logits.argmax(-1, keepdim=True)
    ids = torch.cat([ids, new], dim=1)
```
"""


def text(config, workdir: pathlib.Path, written: Any, weights: str) -> str:
    """The card: sizes, training, the last evaluation of this step, and use.

    Args:
      written: layout, step and parameters (hub_folder.Written).
    """
    m = config.model
    title = f"{config.objective}, {written.parameters:,} parameters"
    rows = {
        "family": f"{config.objective}, alpha_0 = {config.alpha_0:g}",
        "parameters": f"{written.parameters:,}",
        "network": f"{m.style}, {m.blocks} blocks, width {m.width}, {m.heads} heads",
        "weights": f"{weights} at step {written.step:,}",
        "trained on texts of": f"{config.data.seq_len:,} tokens",
        "data": config.data.source,
        "tokenizer": config.data.tokenizer,
    }
    lines = [f"| {name} | {value} |\n" for name, value in rows.items()]
    card = _HEAD.format(objective=config.objective, title=title) + "".join(lines)
    card += _figures(workdir, written.step) + _rounding(written.rounding)
    if written.layout == "esolm":
        return card + _ESOLM.format(length=config.sample.length or config.data.seq_len)
    kind = "Qwen" if m.qkv_bias or m.qk_norm else "Llama"
    return card + _PLAIN.format(kind=kind) + (_MASKED if config.objective != "ar" else "")


def _figures(workdir: pathlib.Path, step: int) -> str:
    """The summary lines of evaluate.json, if it is of this step; else a line that says so."""
    path = workdir / "evaluate.json"
    try:
        found = regular_file.read_json(path, _SIZE) if regular_file.is_there(path) else {}
    except UserError:
        found = {}
    results = found.get("results") if isinstance(found, dict) else None
    if not results or found.get("step") != step:
        return "\nNo evaluation of this step was stored with the model.\n"
    data = found.get("data") or {}
    which = f"{found.get('windows', '?')} windows of the {data.get('split', '?')} split"
    lines = [f"- {result['summary']}\n" for result in results if "summary" in result]
    return f"\n## Figures\n\nOn {which}, {found.get('weights', '?')} weights:\n\n{''.join(lines)}"


def _rounding(changed: dict[str, float]) -> str:
    """What rounding changed; "" if nothing was rounded."""
    if not changed:
        return ""
    change, error = (100 * changed[name] for name in ("perplexity_change", "standard_error"))
    return (
        f"\nRounded weights: logits within {changed['max_logit_error']:.1e} of those of float32; "
        f"the perplexity of texts that it draws changes by {change:+.3f} ± {error:.3f} %. Both are "
        "of float32 arithmetic: `from_pretrained(…, dtype=torch.float32)`; without `dtype`, "
        "`transformers` also computes in 16 bits.\n"
    )
