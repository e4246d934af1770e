"""The compilations of pod_cost.py, by section of its page."""

import dataclasses

from benchmarks import config_files
from esolm_jax.aot import topology


@dataclasses.dataclass(frozen=True)
class Case:
    """One compilation: a config file with its argument and changes, on a pod."""

    file: str
    argument: str
    topology: str
    changes: tuple[tuple[str, object], ...] = ()
    num_slices: int = 1
    full_loss: bool = False

    @property
    def name(self) -> str:
        changes = " ".join(f"{k}={v}" for k, v in self.changes)
        slices = f" x {self.num_slices}" if self.num_slices > 1 else ""
        loss = " full-loss" if self.full_loss else ""
        return f"{self.file}:{self.argument} {self.topology}{slices} {changes}{loss}".strip()

    def config(self):
        config = config_files.read(self.file, self.argument)
        config.update_from_flattened_dict(dict(self.changes))
        return config


def case(file, argument, topology_name, num_slices=1, full_loss=False, **changes) -> Case:
    fields = tuple((name.replace("__", "."), value) for name, value in changes.items())
    return Case(file, argument, topology_name, fields, num_slices, full_loss)


# Everything recomputed, in one micro-batch: `length` and `scaling` compare memory and bytes sent.
PLAIN = {"model__remat": "full", "train__grad_accumulation": 1}
LENGTHS = (1024, 2048, 4096, 8192, 16384)
ROWS = 8  # per chip, in `scaling` and `length`
CHIPS = 4  # of `length`
OWN_ROWS = 32  # per chip, in configs/owt.py
NODES = ("h100:8", "h100:8x8")
SECTIONS = {
    # Each config on the pod of its docstring.
    "configs": [
        case("lm1b_wrap", "0.5", "v5e:4x4"),
        case("owt", "0.5", "v5e:4x4"),
        case("owt", "0.5", "v5e:4x4", data__seq_len=10240, train__batch_size=64),  # owt_10k
        case("medium", "0.5", "v5e:8x8"),
        case("2b", "0.5", "v5e:16x16"),
        case("2b", "0.5", "v5e:16x16", num_slices=2, train__batch_size=1024),
        case("7b", "0.5", "v5p:8x8x8"),
        case("7b", "0.5", "v5p:8x8x8", data__seq_len=10240, model__remat="attention"),
    ],
    # The same batch per chip on more chips.
    "scaling": [
        case("owt", "0.5", name, train__batch_size=ROWS * topology.num_chips(name), **PLAIN)
        for name in ("v5p:2x2x4", "v5p:4x4x4", "v5p:4x8x8", "v5p:8x8x16")
    ],
    # All objectives at one batch, without recomputation.
    "work": [
        case(
            "owt",
            argument,
            "v5p:2x2x4",
            train__batch_size=512,
            model__remat="none",
            train__grad_accumulation=1,
        )
        for argument in ("ar", "mdlm", "bd3", "1", "0.5", "0.125", "0")
    ],
    # Nodes of 8 GPUs: the same batch per GPU on one node and on eight, in one micro-batch.
    "gpus": [
        case(
            file,
            "0.5",
            name,
            train__batch_size=rows * topology.num_chips(name),
            train__grad_accumulation=1,
            mesh__fsdp=fsdp,
            model__remat="operands",
        )
        for file, rows, fsdp in (("owt", OWN_ROWS, 1), ("2b", 16, 8))
        for name in NODES
    ],
    # One model at increasing length, with our loss and with a loss that holds all logits.
    "length": [
        case(
            "owt",
            "0.5",
            "v5p:2x2x1",
            full_loss=f,
            data__seq_len=n,
            train__batch_size=CHIPS * r,
            **PLAIN,
        )
        for f in (False, True)
        for n, r in [(n, ROWS) for n in LENGTHS[: 3 if f else None]] + [(LENGTHS[0], OWN_ROWS)]
    ],
}
