"""Folders of the Hugging Face hub: GPT-2, Llama, Mistral, Qwen 2 and 3, LLaDA, Dream, SDAR; and our
own exports.

config.py     config.json → our config
folder.py     the tensors of a folder: one safetensors file or shards
names.py      parameter names ↔ our pytree
rope_scaling.py     RoPE of config.json ↔ config.model
llada.py      LLaDA's fields and parameter names, as those of a Llama
masks.py      the id of the mask token
qwen_files.py       the tokenizer of a folder without tokenizer.json
from_hub.py   folder → workdir
in_memory.py  folder → model, weights and tokenizer in memory
to_hub.py     workdir → folder of a Llama or Qwen
tokenizer_files.py  our tokenizers for AutoTokenizer
shards.py     writes the weights of a folder
esolm_names.py      parameter names of our own PyTorch code
from_esolm.py       folder of `export --to=hub` → workdir
"""
