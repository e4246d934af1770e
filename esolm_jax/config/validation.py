"""Checks of a whole config: each field, then the consistency of fields."""

from collections.abc import Mapping

from ml_collections import ConfigDict

from esolm_jax.config import checks
from esolm_jax.config.schema import fields, flat
from esolm_jax.data import pack
from esolm_jax.errors import UserError, nearest
from esolm_jax.family import registry


def validate(config: ConfigDict) -> None:
    """UserError that names a field, its value and the allowed values, unless each field is valid
    and the fields are consistent."""
    _check_names_and_types(config)
    values = flat(config)
    for name, field in fields().items():
        wrong = field.check and checks.problem(field.check, values[name])
        _fail_unless(not wrong, name, values[name], wrong)
    pack.check(config)
    _check_objective(config)
    _check_model(config)


def _check_names_and_types(config: ConfigDict) -> None:
    """UserError unless the fields are those of the schema, with values of their types."""
    have, want = flat(config), fields()
    for name in have.keys() - want.keys():
        raise UserError(f"config.{name}: unknown field{nearest(name, want)}")
    for name in want.keys() - have.keys():
        raise UserError(
            f"config.{name}: missing; a config must have every field of default_config()"
        )
    for name, value in have.items():
        kind = type(want[name].default)
        right = type(value) is kind or (kind is float and type(value) is int)
        if not right:
            raise UserError(
                f"config.{name}={value!r}: must be {kind.__name__}, not {type(value).__name__}"
            )


def _fail_unless(ok: bool, name: str, value, allowed: str) -> None:
    if not ok:
        raise UserError(f"config.{name}={value!r}: must be {allowed}")


def _check_objective(config: ConfigDict) -> None:
    """UserError unless alpha_0 and block_length suit the family."""
    family = registry.get(config.objective)
    if family.fixed_alpha_0 is not None:
        _fail_unless(
            config.alpha_0 == family.fixed_alpha_0,
            "alpha_0",
            config.alpha_0,
            f"{family.fixed_alpha_0} with objective {config.objective}",
        )
    if family.is_blockwise:
        _fail_unless(
            config.data.seq_len % config.block_length == 0,
            "block_length",
            config.block_length,
            f"a divisor of data.seq_len = {config.data.seq_len}",
        )


def _check_model(config: ConfigDict) -> None:
    """UserError unless the sizes of the model divide each other."""
    model = config.model
    heads = "attention_width" if model.attention_width else "width"
    _fail_unless(
        model[heads] % (2 * model.heads) == 0,
        f"model.{heads}",
        model[heads],
        f"a multiple of 2 x model.heads = {2 * model.heads}",
    )
    _fail_unless(model.width % 2 == 0, "model.width", model.width, "even")
    _fail_unless(
        model.max_positions == 0 or model.max_positions >= config.data.seq_len,
        "model.max_positions",
        model.max_positions,
        f"0 (RoPE) or at least data.seq_len = {config.data.seq_len}",
    )
    _fail_unless(
        model.heads % (model.kv_heads or 1) == 0,
        "model.kv_heads",
        model.kv_heads,
        f"0 or a divisor of model.heads = {model.heads}",
    )


def validate_mesh(config: ConfigDict, mesh: Mapping[str, int]) -> None:
    """UserError unless heads and tokens divide by the axes of the mesh (sizes by name)."""
    kv_heads = config.model.kv_heads or config.model.heads
    tensor, sequence = mesh["tensor"], mesh["sequence"]
    for name, value in (("model.heads", config.model.heads), ("model.kv_heads", kv_heads)):
        if value % tensor:
            raise UserError(
                f"config.{name}={value}: must be a multiple of config.mesh.tensor={tensor}"
            )
    if config.data.seq_len % sequence:
        raise UserError(
            f"config.data.seq_len={config.data.seq_len}: must be a multiple of "
            f"config.mesh.sequence={sequence}"
        )


def _check_annealing(config: ConfigDict) -> None:
    """UserError if annealing lacks one of the phases."""
    if config.train.anneal_steps:
        _fail_unless(
            registry.get(config.objective).has_two_phases and 0 < config.alpha_0 < 1,
            "train.anneal_steps",
            config.train.anneal_steps,
            "0 unless objective has two phases (eso_a, eso_b) and alpha_0 between 0 and 1, both "
            f"excluded (they are {config.objective} and {config.alpha_0})",
        )


def validate_training(config: ConfigDict, fractions: dict[str, float], row_shards: int) -> None:
    """UserError unless the config can be trained: low variance only without a sequential phase,
    annealing only with both phases, and a whole number of rows for each phase that divides by the
    micro-batches and by the devices that shard rows."""
    _check_annealing(config)
    _fail_unless(
        not config.low_variance or config.alpha_0 == 1,
        "low_variance",
        config.low_variance,
        f"False unless alpha_0 is 1 (it is {config.alpha_0})",
    )
    batch, accumulation = config.train.batch_size, config.train.grad_accumulation
    for phase, fraction in fractions.items():
        share = fraction * batch
        rows = round(share)
        reason = f"but the {phase} loss gets {share:g} rows"
        if len(fractions) > 1:
            reason += f" (kappa={config.kappa})"
        if abs(share - rows) > 1e-6 or rows == 0:
            raise UserError(
                f"config.train.batch_size={batch}: must give each loss a positive whole "
                f"number of rows, {reason}"
            )
        if rows % (accumulation * row_shards):
            raise UserError(
                f"config.train.batch_size={batch}: must give each loss a multiple of "
                f"train.grad_accumulation x devices (mesh.data x mesh.fsdp) = {accumulation} x "
                f"{row_shards} rows, {reason}"
            )


def _check_num_orders(config: ConfigDict) -> None:
    """UserError if the importance-weighted bound does not exist for the family."""
    num_orders = config.eval.num_orders
    if num_orders and not registry.get(config.objective).has_any_order_likelihood:
        raise UserError(
            f"config.eval.num_orders={num_orders}: must be 0 with objective {config.objective}, "
            "because only eso_b has an any-order likelihood"
        )


def validate_evaluation(config: ConfigDict, row_shards: int) -> None:
    """UserError unless the requested bounds exist and a batch divides by the devices that shard
    rows."""
    _check_num_orders(config)
    e = config.eval
    if e.batch_size % row_shards:
        raise UserError(
            f"config.eval.batch_size={e.batch_size}: must be a multiple of mesh.data x "
            f"mesh.fsdp = {row_shards}"
        )
