"""Compares lower bounds of a run's memory with the available memory, before any allocation.

A refused config cannot fit. The bounds follow from the sizes in the config alone. CPU
devices share the memory of their host.
"""

import dataclasses
import os
import pathlib
import resource
from collections.abc import Sequence

import jax.numpy as jnp

from esolm_jax.data.manifest import tokenizer_entry
from esolm_jax.data.tokenizer import Tokenizer
from esolm_jax.errors import UserError
from esolm_jax.family import registry
from esolm_jax.model import build
from esolm_jax.model.lm_head import SMALLEST_CHUNK
from esolm_jax.model.model_config import TIME_FREQUENCIES, ModelConfig
from esolm_jax.parallel import sharding
from esolm_jax.sampling import generate
from esolm_jax.sampling import texts as texts_lib
from esolm_jax.sampling.plan.prompts import Prompt

GB = 1e9
FLOAT = 4
BATCH_BYTES = 4 + 1  # per token: its id and whether it is valid
CANVAS_BYTES = 4 + 1 + 4 + 4 + 1  # per token: Canvas.token, known; Schedule.order, known, …
TABLE_BYTES = 7 * 4  # per pass and row: Schedule.sizes and the tables of DecodePlan
WORKER_BYTES = 80e6  # per worker process, alone: 88 MB at 49b28bf
WORKERS_PER_CORE = 16  # more contend for cores: 256 on 2 cores took 10 minutes to start at 49b28bf
_NO_LIMIT = 2**60


@dataclasses.dataclass(frozen=True)
class Need:
    """Bytes of one use of memory, per device or on the host.

    Attributes:
      what: its name in messages. fields: config fields that reduce it.
    """

    what: str
    fields: tuple[str, ...]
    bytes: float
    on_device: bool = True


def num_params(model: ModelConfig) -> int:
    """The number of parameters of model.init."""
    width, heads, inner, cond = model.width, model.heads, model.inner, model.cond_width
    biased = model.style in ("dit", "gpt2")
    norm = 2 * width if model.style == "gpt2" else width
    gates = 2 if model.style == "llama" else 1
    qkv = (heads + 2 * model.groups) * model.head_width
    block = 2 * norm
    block += qkv * (width + model.qkv_bias) + 2 * model.head_width * model.qk_norm
    block += heads * model.head_width * width + width * (model.style == "gpt2")
    block += gates * inner * (width + biased) + width * (inner + biased)
    rest = norm + model.max_positions * width
    rest += model.vocab_size * (2 * width + (model.style == "dit"))
    if cond:
        block += 6 * width * (cond + 1)
        rest += cond * (TIME_FREQUENCIES + 1) + cond * (cond + 1) + 2 * width * (cond + 1)
    return model.blocks * block + rest


def _model_fields(model: ModelConfig) -> tuple[str, ...]:
    ends = 2 * model.vocab_size * model.width
    if 2 * ends > num_params(model):
        return "data.vocab_size", "model.width"
    return "model.width", "model.blocks"


def _params(model: ModelConfig, mesh, copies: float, what: str) -> Need:
    """`copies` copies of all parameters, with the finest possible sharding."""
    shards = mesh.shape["fsdp"] * mesh.shape["tensor"]
    return Need(what, _model_fields(model), copies * FLOAT * num_params(model) / shards)


def _forward(config, model: ModelConfig, mesh, field: str, rows: float, kept: int) -> list[Need]:
    """One forward pass of `rows` rows, with the hidden states of `kept` layers."""
    length = config.data.seq_len
    tokens = rows * length / sharding.num_row_shards(mesh)
    fields = ("data.seq_len", field) if length > rows else (field, "data.seq_len")
    itemsize = jnp.dtype(model.dtype).itemsize
    hidden = tokens / mesh.shape["sequence"] * model.width * itemsize * kept
    chunk = min(config.model.loss_chunk or SMALLEST_CHUNK, tokens / mesh.shape["sequence"])
    logits = chunk * model.vocab_size / mesh.shape["tensor"] * FLOAT
    return [
        Need("batch", fields, tokens / mesh.shape["sequence"] * BATCH_BYTES),
        Need("hidden states", fields, hidden),
        Need("logits", ("model.loss_chunk", "data.vocab_size"), logits),
    ]


def check_training(config, model: ModelConfig, mesh) -> None:
    """UserError unless the state, a micro-batch and the reader's batches may fit."""
    from esolm_jax.data.reader import PREFETCH  # imports Grain, which sampling does not need

    t, workers = config.train, config.data.workers
    cores = os.cpu_count() or 1
    if workers > WORKERS_PER_CORE * cores:
        raise UserError(
            f"config.data.workers={workers}: must be at most {WORKERS_PER_CORE * cores} on "
            f"{cores} cores, because each worker is a process"
        )
    state = _params(model, mesh, 5, "weights, their average, Adam's moments and gradients")
    # The backward pass keeps the input of each block, with any model.remat.
    step = _forward(
        config, model, mesh, "train.batch_size", t.batch_size / t.grad_accumulation, model.blocks
    )
    share = mesh.local_mesh.size / mesh.size
    batch = t.batch_size * config.data.seq_len * BATCH_BYTES * share
    fields = ("data.seq_len", "train.batch_size")
    fields = fields if config.data.seq_len > t.batch_size else fields[::-1]
    host = [
        Need("batches read ahead", fields, batch * PREFETCH * max(1, workers), on_device=False),
        Need("worker processes", ("data.workers",), WORKER_BYTES * workers, on_device=False),
    ]
    _check(config, mesh, [state, *step, *host])
    weights = _params(model, mesh, 4, "weights, their average and Adam's moments")
    _check(config, mesh, [weights, *_forward(config, model, mesh, *_evaluated(config))])


def _evaluated(config) -> tuple[str, int, int]:
    return "eval.batch_size", config.eval.batch_size, 1


def check_evaluation(config, model: ModelConfig, mesh) -> None:
    """UserError unless the weights, a batch and the keys of its draws may fit."""
    e = config.eval
    drawn = e.batch_size * e.num_orders * FLOAT
    keys = 2 * FLOAT * e.num_samples
    needs = [
        _params(model, mesh, 1, "weights"),
        *_forward(config, model, mesh, *_evaluated(config)),
        Need("likelihoods of orders", ("eval.num_orders", "eval.batch_size"), drawn),
        Need("keys of draws", ("eval.num_samples",), keys),
    ]
    _check(config, mesh, needs)


def check_sampling(config, model: ModelConfig, mesh, rows: int, length: int, prompted: bool):
    """UserError unless the weights, `rows` texts of `length` tokens and their cache may fit."""
    s = config.sample
    itemsize = jnp.dtype(model.dtype if s.cache_dtype == "auto" else s.cache_dtype).itemsize
    fields = ("sample.num_texts", "sample.length")
    if length > rows:
        fields = fields[::-1]
    local = rows / sharding.num_row_shards(mesh)
    kv = 2 * model.groups * model.head_width / mesh.shape["tensor"] * model.blocks * itemsize
    family = registry.get(config.objective)
    block = family.rank_span(length, config.block_length)
    is_cached = family.keeps_cache and length > 2 * block and not s.steps
    is_plain = generate.loop_name(config) == "plain"
    is_one_a_pass = is_plain and not (s.steps or prompted)
    tables = TABLE_BYTES * rows * length if is_one_a_pass else 0
    needs = [
        *_sampled_weights(s.weight_dtype, model, mesh),
        Need("keys and values", fields, local * length * kv * is_cached),
        Need("canvas", fields, CANVAS_BYTES * rows * length, on_device=False),
        Need("tables of passes", fields, tables, on_device=False),
    ]
    _check(config, mesh, needs)


def _sampled_weights(dtype: str, model: ModelConfig, mesh) -> list[Need]:
    """float32 parameters on the devices; or on the host, which rounds them, and 8-bit matrices and
    the embedding on the devices."""
    if dtype == "auto":
        return [_params(model, mesh, 1, "weights")]
    embedding, fields = model.vocab_size * model.width, _model_fields(model)
    codes = (num_params(model) - embedding) / mesh.shape["tensor"]
    held = codes + embedding * jnp.dtype(model.dtype).itemsize
    whole = FLOAT * num_params(model)
    return [
        Need("8-bit weights", fields, held),
        Need("weights to round", fields, whole, on_device=False),
    ]


def check_cache_dtype(dtype: str, device) -> None:
    """UserError if a GPU has no arithmetic for the KV cache's dtype."""
    capability = getattr(device, "compute_capability", None)
    if dtype.startswith("float8") and capability and float(capability) < 8.9:
        raise UserError(
            f"config.sample.cache_dtype={dtype!r}: must be auto or int8, because GPUs of compute "
            f"capability {capability} have no {dtype}"
        )


def check_sampling_fits(config, tokenizer: Tokenizer, prompts: Sequence[Prompt], mesh) -> None:
    """UserError unless the texts of config.sample fit the devices and their memory."""
    check_cache_dtype(config.sample.cache_dtype, mesh.devices.flat[0])
    rows, shards = config.sample.num_texts * max(1, len(prompts)), sharding.num_row_shards(mesh)
    if rows % shards:
        raise UserError(
            f"config.sample.num_texts={config.sample.num_texts}: {rows} texts in total: must be a "
            f"multiple of mesh.data x mesh.fsdp = {shards}"
        )
    if mesh.shape["sequence"] > 1:
        raise UserError(
            f"config.mesh.sequence={mesh.shape['sequence']}: must be 1 for sampling; put those "
            "devices on another axis"
        )
    model = build.model_config(config, tokenizer_entry(tokenizer), sharding.platform(mesh))
    length = texts_lib.length_of(config)
    lengths = [len(prompt.tokens) if prompt.is_whole else length for prompt in prompts]
    longest = max(lengths, default=length)
    check_sampling(config, model, mesh, rows, longest, prompted=bool(prompts))


def _check(config, mesh, needs: Sequence[Need]) -> None:
    on_device = [need for need in needs if need.on_device]
    if sharding.platform(mesh) == "cpu":
        count = mesh.local_mesh.size
        shared = [dataclasses.replace(n, bytes=n.bytes * count) for n in on_device]
        on_device, needs = [], [*shared, *(n for n in needs if not n.on_device)]
    else:
        needs = [need for need in needs if not need.on_device]
        _fail_unless_fits(config, on_device, *device_memory(mesh))
    _fail_unless_fits(config, needs, *host_memory())


def _fail_unless_fits(config, needs: Sequence[Need], have: float, name: str) -> None:
    total = sum(need.bytes for need in needs)
    if total <= have:
        return
    needs = sorted(needs, key=lambda need: -need.bytes)
    section, field = needs[0].fields[0].split(".")
    parts = ", ".join(f"{n.what} {n.bytes / GB:,.1f}" for n in needs if n.bytes > 0.05 * total)
    raise UserError(
        f"config.{section}.{field}={config[section][field]!r}: needs at least {total / GB:,.1f} GB "
        f"({parts}), but {name} {have / GB:,.1f} GB; lower {' or '.join(needs[0].fields)}"
    )


def device_memory(mesh) -> tuple[float, str]:
    """Bytes that a program may use on one of this process's accelerators."""
    limits = [(d.memory_stats() or {}).get("bytes_limit") for d in mesh.local_mesh.devices.flat]
    known = [limit for limit in limits if limit]
    kind = sharding.platform(mesh).upper()
    return (min(known), f"a {kind} has") if known else (_NO_LIMIT, f"a {kind} has")


def host_memory() -> tuple[float, str]:
    """The memory limit of this process in bytes, swap included, and its source."""
    limits = [
        (_physical(), "this machine has"),
        (_control_group(), "the control group of this process (a container, a job) has"),
        (resource.getrlimit(resource.RLIMIT_AS)[0], "ulimit -v leaves this process"),
    ]
    return min(limit if limit[0] > 0 else (_NO_LIMIT, limit[1]) for limit in limits)


def _meminfo(name: str) -> int:
    """Bytes of a line of /proc/meminfo; −1 if it is missing."""
    try:
        lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
    except (OSError, ValueError, IndexError, StopIteration):
        return -1


def _physical() -> int:
    if (total := _meminfo("MemTotal")) > 0:
        return total + max(0, _meminfo("SwapTotal"))
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return -1  # unknown


def _control_group(root: str = "/sys/fs/cgroup", of: str = "/proc/self/cgroup") -> int:
    """The smallest limit of the process's control group (version 1 or 2) and its parents, with all
    swap; −1 for none."""
    try:
        lines = pathlib.Path(of).read_text().splitlines()
    except OSError:
        return -1
    limits = []
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0":
            base, file = pathlib.Path(root), "memory.max"
        elif "memory" in controllers.split(","):
            base, file = pathlib.Path(root, "memory"), "memory.limit_in_bytes"
        else:
            continue
        here = base / path.lstrip("/")
        folders = [f for f in (here, *here.parents) if f == base or base in f.parents]
        limits += [_number(folder / file) for folder in {base, *folders}]
    least = min((limit for limit in limits if limit > 0), default=-1)
    return least + max(0, _meminfo("SwapTotal")) if least > 0 else -1


def _number(file: pathlib.Path) -> int:
    try:
        return int(file.read_text())
    except (OSError, ValueError):  # not there, or "max"
        return -1
