"""config.sample → the loops of LLaDA, Dream and SDAR, and which fields each of them reads."""

from collections.abc import Callable
from typing import Any

from esolm_jax import config as config_lib
from esolm_jax.family import registry
from esolm_jax.family.family import Family, whole_text
from esolm_jax.sampling.loops import dream, llada, sdar
from esolm_jax.sampling.loops.loop import Ends, Loop, Task
from esolm_jax.sampling.loops.whole_text import WholeText

NAMES = ("llada", "dream", "sdar")
_ORDERS = {"llada": llada.ORDERS, "dream": dream.ORDERS, "sdar": sdar.ORDERS}
_READ_BY = {  # field → the loops that read it
    "order": NAMES,
    "order_temperature": ("dream",),
    "guidance": ("llada",),
    "eos": ("llada",),
}
_NOT_READ_BY = {"top_p": ("llada",), "top_k": ("llada",)}


def make_llada(config, task: Task, ends: Ends) -> Loop:
    s = config.sample
    eos, both = (tuple(i for i in ids if i is not None) for ids in (ends[:1], ends))
    rule = llada.LLaDA(
        steps=s.steps,
        block_length=s.block_length,
        order=s.order,
        temperature=s.temperature,
        guidance=s.guidance,
        never=eos if s.eos == "never" else (),
        late=both if s.eos == "late" else (),
    )
    return WholeText(task, rule, _family(config).predicts_next)


def make_dream(config, task: Task, ends: Ends) -> Loop:
    s = config.sample
    rule = dream.Dream(
        steps=s.steps,
        order=s.order,
        order_temperature=s.order_temperature,
        temperature=s.temperature,
        top_p=s.top_p,
        top_k=s.top_k,
    )
    return WholeText(task, rule, _family(config).predicts_next)


def make_sdar(config, task: Task, ends: Ends) -> Loop:
    s = config.sample
    rule = sdar.Rule(
        block_length=config.block_length,
        steps=s.steps,
        order=s.order,
        threshold=s.confidence_threshold,
        temperature=s.temperature,
        top_k=s.top_k,
        top_p=s.top_p,
    )
    return sdar.SDAR(task, rule)


def _family(config) -> Family:
    return registry.get(config.objective)


_FITS: dict[str, tuple[Callable[[Family], bool], str]] = {
    "llada": (lambda family: family.rank_span is whole_text, "reads the whole text in every pass"),
    "dream": (lambda family: family.rank_span is whole_text, "reads the whole text in every pass"),
    "sdar": (lambda family: family.is_blockwise, "generates block by block"),
}


def rules(config, loop: str) -> dict[str, tuple[bool, str]]:
    """Field of config.sample → (whether it is valid, the allowed values), with any loop."""
    s = config.sample
    found: dict[str, tuple[bool, str]] = {}
    defaults: dict[str, Any] = {n: config_lib.fields()[f"sample.{n}"].default for n in s}
    for name, loops in _READ_BY.items():
        is_right = loop in loops or s[name] == defaults[name]
        found[name] = (is_right, f"{defaults[name]!r} unless sample.loop is {' or '.join(loops)}")
    for name, loops in _NOT_READ_BY.items():
        is_right = loop not in loops or s[name] == defaults[name]
        found[name] = (is_right, f"{defaults[name]!r} with sample.loop {loop}")
    if loop in NAMES:
        orders, (fits, reason) = _ORDERS[loop], _FITS[loop]
        found["order"] = (s.order in orders, f"one of {', '.join(orders)} with sample.loop {loop}")
        found["loop"] = (
            fits(_family(config)),
            f"another with objective {config.objective} ({loop} {reason})",
        )
    return found
