"""The mask token of a folder of the Hugging Face hub."""

from typing import Any

from esolm_jax.data.hub_tokenizer import HubTokenizer
from esolm_jax.data.tokenizer import Tokenizer
from esolm_jax.interop.hub import config as hub_config

# Names of mask tokens, for a config.json without mask_token_id.
_NAMES = ("<|mdm_mask|>", "<|mask|>", "<|MASK|>", "[MASK]")


def special_ids(content: bytes, hub: dict[str, Any], ids: int, where: str) -> dict[str, int]:
    """The ids of a HubTokenizer. The mask of a diffusion model is mask_token_id of config.json, or
    the token of a usual name; that of other models is one past the vocabulary.

    Args:
      content: of tokenizer.json. hub: config.json, named `where` in errors. ids: rows of the
        embedding.

    Raises:
      UserError: EOS is missing, or an id is not one of the vocabulary.
    """
    special = {"vocab_size": ids, **hub_config.special_ids(hub, where)}
    if not hub_config.is_diffusion(hub):
        return special
    mask = hub_config.mask_id(hub, ids, where)
    if mask is None:
        tokens = HubTokenizer(content, special).recognizing()
        named = (tokens.token_to_id(name) for name in _NAMES)
        mask = next((i for i in named if i is not None), None)
    return special if mask is None else special | {"mask": mask}


def describe(tokenizer: Tokenizer, hub: dict[str, Any]) -> str:
    """One line for the user: which id stands for unknown tokens, and why."""
    chosen = f"mask token: id {tokenizer.mask_id}"
    if hub.get("mask_token_id") is not None:
        return f"{chosen} (mask_token_id of {hub_config.FILE})"
    if tokenizer.mask_id < tokenizer.vocab_size:
        return f"{chosen}, by its name, because {hub_config.FILE} has no mask_token_id"
    added = f"{chosen}, a new one after the vocabulary"
    if hub_config.is_diffusion(hub):
        return f"WARNING: {added}, because the folder names none: the model was not trained with it"
    return added
