"""Folders of the Hugging Face hub: GPT-2, Llama, Qwen 2 and 3, LLaDA, Dream, SDAR.

config.py      config.json → our config
folder.py      the tensors of a folder: one safetensors file or shards
names.py       parameter names ↔ our pytree
llada.py       LLaDA's fields and parameter names, as those of a Llama
masks.py       the id of the mask token
qwen_files.py  the tokenizer of a folder without tokenizer.json
from_hub.py    folder → workdir
in_memory.py   folder → model, weights and tokenizer in memory
to_hub.py      workdir → folder
"""
