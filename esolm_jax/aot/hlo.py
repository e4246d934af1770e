"""The cost of a compiled program on one chip, from its optimised HLO text.

XLA's own cost analysis counts the body of a scan once and ignores Pallas kernels. This analysis
follows calls from the entry computation and multiplies loops by their trip counts. It counts the
FLOPs of matrix products that the chip executes, recomputation included. It does not count
element-wise and transcendental operations.
"""

import dataclasses
import re
from collections.abc import Mapping

from esolm_jax.aot.hlo_collectives import Collective, bytes_by_kind, collectives, started_channels
from esolm_jax.aot.hlo_loops import Frame, trip_count
from esolm_jax.aot.hlo_parse import Computation, Instruction, Module, Shape, parse
from esolm_jax.aot.hlo_products import product_flops

KERNEL_TARGETS = ("tpu_custom_call", "__gpu$xla.gpu.triton")  # of custom calls: Pallas kernels


class UnknownLoop(ValueError):
    """A loop with a data-dependent trip count that `trip_counts` does not give."""


@dataclasses.dataclass(frozen=True)
class Product:
    """A matrix product. flops: FLOPs of one execution."""

    flops: float
    op_name: str
    executions: float = 1
    loops: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A Pallas kernel. flops: FLOPs of one execution; None if `kernel_flops` does not give them."""

    name: str
    op_name: str
    operands: tuple[Shape, ...]
    results: tuple[Shape, ...]
    flops: float | None
    executions: float = 1
    loops: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Loop:
    """A loop with a trip count that depends on data."""

    op_name: str
    executions: float = 1
    loops: tuple[str, ...] = ()


Event = Product | Kernel | Collective | Loop


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost of one run of the program on one chip.

    Attributes:
      flops: FLOPs of all matrix products, and of the kernels that `kernel_flops` names.
      flops_by_kind: the same, split by op_name.
      collectives: kind → bytes that one chip sends (hlo_collectives.Collective).
      products, messages, kernels: the parts, each with its executions.
      uncounted_kernels: kernels without an entry in `kernel_flops`.
      unknown_loops: data-dependent loops without an entry in `trip_counts`; counted once.
    """

    flops: float
    flops_by_kind: Mapping[str, float]
    collectives: Mapping[str, float]
    products: tuple[Product, ...]
    messages: tuple[Collective, ...]
    kernels: tuple[Kernel, ...]
    uncounted_kernels: tuple[Kernel, ...]
    unknown_loops: tuple[Loop, ...]


def analyse(
    text: str,
    *,
    trip_counts: Mapping[str, float] = {},
    kernel_flops: Mapping[str, float] = {},
    branches: Mapping[str, int] = {},
    kinds: Mapping[str, str] = {},
    strict: bool = False,
) -> Cost:
    """Adds up the optimised HLO of one chip, `Compiled.as_text()`.

    Every mapping is tried in order; its first match wins.

    Args:
      trip_counts: part of a loop's op_name → executions; for data-dependent loops only.
      kernel_flops: part of a Pallas kernel's name or op_name → FLOPs of one execution;
        a whole name goes before a part.
      branches: part of a conditional's op_name → index of the usual branch (false 0, true 1),
        as JAX numbers them.
        Default: the branch with most FLOPs, and of equals the one that sends most.
      kinds: regular expression, searched in an op_name, with the name in front if it is a kernel's
        → kind; "other" where none matches.
      strict: raise at a loop with unknown trip count, rather than list it.

    Raises:
      ValueError: not an HLO module. UnknownLoop: see strict.
    """
    module = parse(text)
    reader = _Reader(trip_counts, kernel_flops, branches, started_channels(module))
    events = reader.events(Frame(module, module.entry))
    loops = tuple(e for e in events if isinstance(e, Loop))
    if strict and loops:
        names = ", ".join(sorted({repr(loop.op_name) for loop in loops}))
        raise UnknownLoop(f"trip count depends on data: {names}; give it in trip_counts")
    kernels = tuple(e for e in events if isinstance(e, Kernel))
    messages = tuple(e for e in events if isinstance(e, Collective))
    products = tuple(e for e in events if isinstance(e, Product))
    work = [w for w in (*products, *kernels) if w.flops is not None]
    by_kind = {}
    for w in work:
        kind = _kind(f"{getattr(w, 'name', '')} {w.op_name}", kinds)
        by_kind[kind] = by_kind.get(kind, 0) + w.flops * w.executions
    return Cost(
        flops=sum(by_kind.values()),
        flops_by_kind=by_kind,
        collectives=bytes_by_kind(messages),
        products=products,
        messages=messages,
        kernels=kernels,
        uncounted_kernels=tuple(k for k in kernels if k.flops is None),
        unknown_loops=loops,
    )


def _target(i: Instruction) -> str:
    return (i.attribute("custom_call_target") or "").strip('"')


def _kind(op_name: str, kinds: Mapping[str, str]) -> str:
    return next((kind for pattern, kind in kinds.items() if re.search(pattern, op_name)), "other")


def first_match(mapping: Mapping[str, float], *names: str) -> float | None:
    """The value of the first key that is a part of a name."""
    return next((v for key, v in mapping.items() if any(key in name for name in names)), None)


@dataclasses.dataclass(frozen=True)
class _Reader:
    trip_counts: Mapping[str, float]
    kernel_flops: Mapping[str, float]
    branches: Mapping[str, int]
    started: set[str]

    def events(self, frame: Frame) -> list[Event]:
        """The events of one execution of a computation, calls included."""
        return [
            e
            for i in frame.computation.instructions.values()
            for e in self.instruction_events(i, frame)
        ]

    def instruction_events(self, i: Instruction, frame: Frame) -> list[Event]:
        """The events of one execution of an instruction."""
        if i.opcode == "while":
            return self._loop(i, frame)
        if i.opcode == "conditional":
            return self._branch(i, frame)
        if i.opcode in ("fusion", "call", "async-start"):
            names = i.names("calls") or i.names("to_apply") or i.names("called_computation")
            return [e for name in names for e in self.events(frame.enter(i, name))]
        if i.opcode == "custom-call" and _target(i) in KERNEL_TARGETS:
            return [self._kernel(i, frame)]
        if flops := product_flops(i, frame.computation):
            return [Product(flops, i.op_name)]
        sent = collectives(i, frame.computation, frame.module, self.started)
        around = frame.call.op_name if frame.call else ""
        return [m if m.op_name else dataclasses.replace(m, op_name=around) for m in sent]

    def _loop(self, i: Instruction, frame: Frame) -> list[Event]:
        name = i.op_name or i.name
        count = trip_count(i, frame)
        count = first_match(self.trip_counts, name) if count is None else count
        unknown = [Loop(name)] if count is None else []
        count = 1 if count is None else count
        body = [
            dataclasses.replace(e, executions=e.executions * count, loops=(name, *e.loops))
            for e in self.events(frame.enter(i, i.attribute("body")))
        ]
        return unknown + (body if count else [])

    def _branch(self, i: Instruction, frame: Frame) -> list[Event]:
        each = [self.events(frame.enter(i, name)) for name in branch_names(i, frame.module)]
        usual = first_match(self.branches, i.op_name or i.name)
        return each[usual] if usual is not None else max(each, key=_weight)

    def _kernel(self, i: Instruction, frame: Frame) -> Kernel:
        operands = [s for o in i.operands for s in frame.computation.instructions[o].shapes]
        flops = self.kernel_flops.get(i.name)  # first: kernel.1 is a part of kernel.10
        if flops is None:
            flops = first_match(self.kernel_flops, i.name, i.op_name)
        return Kernel(i.name, i.op_name, tuple(operands), i.shapes, flops)


def flops_of(i: Instruction, frame: Frame, kernel_flops: Mapping[str, float]) -> float:
    """FLOPs of one execution of a launched instruction; kernel_flops as those of analyse."""
    events = _Reader({}, kernel_flops, {}, set()).instruction_events(i, frame)
    return sum(e.flops or 0.0 for e in events if isinstance(e, Product | Kernel))


def branch_names(i: Instruction, module: Module) -> list[str]:
    """The computations of a conditional, in JAX's order."""
    names = i.names("branch_computations")
    names = names or i.names("false_computation") + i.names("true_computation")
    return sorted(names, key=lambda name: _branch_number(i, module.computations[name]))


def _branch_number(i: Instruction, branch: Computation) -> int:
    """The number that JAX gave a branch, from the op_names in it; 0 if they do not tell. A compiler
    may negate the predicate and swap the branches."""
    pattern = re.compile(re.escape(i.op_name) + r"/branch_(\d+)_fun")
    matches = (pattern.match(inner.op_name) for inner in branch.instructions.values())
    return next((int(match[1]) for match in matches if match), 0)


def _weight(events: list[Event]) -> tuple[float, float]:
    """FLOPs and bytes of a branch."""
    work = [e for e in events if isinstance(e, Product | Kernel)]
    sent = bytes_by_kind(e for e in events if isinstance(e, Collective))
    return sum((e.flops or 0) * e.executions for e in work), sum(sent.values())
