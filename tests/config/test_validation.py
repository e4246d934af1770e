"""The schema: every config file fits it, every field is used, every bad value is told."""

import re

import pytest
from config_files import FILES, ROOT, load
from ml_collections import ConfigDict

from esolm_jax import config as config_lib
from esolm_jax.config import default_config, flat, validate, validate_training
from esolm_jax.errors import UserError


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_config_file_is_valid_locked_and_complete(path):
    config = load(path)
    if config is None:
        pytest.skip("no get_config: shared by other config files")
    validate(config)
    assert config.is_locked and config.model.is_locked
    assert flat(config).keys() == flat(default_config()).keys()


def test_there_are_config_files():
    assert any(load(path) for path in FILES)


def test_default_config_is_valid():
    validate(default_config())


@pytest.mark.parametrize("name", flat(default_config()))
def test_field_is_read_by_the_code(name):
    last = name.split(".")[-1]
    package = ROOT / "esolm_jax"
    sources = [p for p in package.rglob("*.py") if package / "config" not in p.parents]
    # config.data.seq_len, or config.data[name] with the name in quotes
    pattern = re.compile(rf'(\.{last}\b(?!\())|("{last}")')
    assert any(pattern.search(path.read_text()) for path in sources)


def test_flat_gives_dotted_names():
    config = ConfigDict({"a": 1, "b": {"c": 2, "d": {"e": 3}}})
    assert flat(config) == {"a": 1, "b.c": 2, "b.d.e": 3}


# Field, a bad value, and how the message tells what is allowed.
OUT_OF_RANGE = [
    ("seed", -1, "in [0, 2**32)"),
    ("seed", 2**32, "in [0, 2**32)"),
    ("sample.seed", -1, "in [0, 2**32)"),
    ("sample.seed", 2**32, "in [0, 2**32)"),
    ("alpha_0", 1.5, "in [0, 1]"),
    ("alpha_0", -0.1, "in [0, 1]"),
    ("alpha_0", float("nan"), "in [0, 1]"),
    ("kappa", 0.0, "between 0 and 1, both excluded"),
    ("kappa", 1.0, "between 0 and 1, both excluded"),
    ("block_length", 0, "at least 1"),
    ("data.source", "tfds:", "shakespeare, text, text8 or tfds:<name>"),
    ("data.source", "wikipedia", "shakespeare, text, text8 or tfds:<name>"),
    ("data.holdout", 0.0, "between 0 and 0.5"),
    ("data.holdout", 0.5, "between 0 and 0.5"),
    ("data.seq_len", 1, "at least 2"),
    ("data.packing", "wraps", "one of wrap, pad"),
    ("data.tokenizer", "gpt4", "one of sentencepiece, bytes, gpt2, bert, tokenizers, text8"),
    ("data.document", "word", "one of piece, file, line, line_with_newline, paragraph, separator"),
    ("data.detokenizer", "wiki", "one of none, wikitext, ptb, lm1b, lambada, scientific_papers"),
    ("data.document_end", "sep", "one of eos, bos, none"),
    ("data.window_specials", "cls", "one of none, bos_eos, bos_bos"),
    ("data.window_mode", "whole", "one of all, published"),
    ("data.window_group", 0, "at least 1"),
    ("data.window_shards", 0, "at least 1"),
    ("data.tokenizer_ids", -1, "at least 0"),
    ("start_token", "eos", "one of bos, mask, none"),
    ("data.vocab_size", 7, "at least 8"),
    ("data.workers", -1, "at least 0"),
    ("model.width", 0, "at least 2"),
    ("model.blocks", 0, "at least 1"),
    ("model.heads", 0, "at least 1"),
    ("model.cond_width", -1, "at least 0"),
    ("model.dropout", 1.0, "in [0, 1)"),
    ("model.dropout", -0.1, "in [0, 1)"),
    ("model.dtype", "float16", "one of float32, bfloat16"),
    ("model.dropout_bits", "rbg", "one of auto, threefry2x32, mix32"),
    ("model.unroll", -1, "at least 0"),
    ("model.style", "gpt", "one of dit, gpt2, llama"),
    ("model.kv_heads", -1, "at least 0"),
    ("model.mlp_width", -1, "at least 0"),
    ("model.attention_width", -1, "at least 0"),
    ("model.norm_eps", 0.0, "above 0"),
    ("model.max_positions", -1, "at least 0"),
    ("model.rope_base", 1.0, "above 1"),
    ("model.rope_factor", 0.5, "at least 1"),
    ("model.rope_original_length", 0, "at least 1"),
    ("model.rope_scaling", "dynamic", "one of llama3, linear, yarn"),
    ("model.rope_low", 0.0, "above 0"),
    ("model.rope_high", -1.0, "above 0"),
    ("model.rope_attention_factor", 0.0, "above 0"),
    ("model.attention", "sparse", "one of auto, dense, chunked, flash, cudnn, splash"),
    ("model.remat", "some", "one of none, operands, matmuls, attention, full"),
    ("model.loss_chunk", -1, "at least 0"),
    ("mesh.data", 0, "-1 (the rest of the devices) or at least 1"),
    ("mesh.data", -2, "-1 (the rest of the devices) or at least 1"),
    ("mesh.fsdp", 0, "-1 (the rest of the devices) or at least 1"),
    ("mesh.tensor", 0, "-1 (the rest of the devices) or at least 1"),
    ("mesh.sequence", 0, "-1 (the rest of the devices) or at least 1"),
    ("mesh.devices", -1, "at least 0"),
    ("distributed.init_timeout", 0, "at least 1"),
    ("distributed.heartbeat_timeout", 0, "at least 1"),
    ("distributed.barrier_timeout", 0, "at least 1"),
    ("optimizer.learning_rate", 0.0, "above 0"),
    ("optimizer.learning_rate", float("nan"), "above 0"),
    ("optimizer.b1", 1.0, "in [0, 1)"),
    ("optimizer.b2", -0.1, "in [0, 1)"),
    ("optimizer.eps", 0.0, "above 0"),
    ("optimizer.weight_decay", -0.1, "at least 0"),
    ("optimizer.clip_norm", 0.0, "above 0"),
    ("optimizer.warmup_steps", -1, "at least 0"),
    ("optimizer.schedule", "linear", "one of constant, cosine"),
    ("optimizer.ema_decay", 1.0, "in [0, 1)"),
    ("train.batch_size", 0, "at least 1"),
    ("train.grad_accumulation", 0, "at least 1"),
    ("train.steps", 0, "at least 1"),
    ("train.anneal_steps", -1, "at least 0"),
    ("train.log_every", 0, "at least 1"),
    ("train.eval_every", 0, "at least 1"),
    ("train.eval_windows", -1, "at least 0"),
    ("train.checkpoint_every", 0, "at least 1"),
    ("train.metrics", "nelbo,nelbo", "comma-separated, each once, of nelbo, importance_weighted"),
    ("train.keep_last", 0, "at least 1"),
    ("train.keep_best", -1, "at least 0"),
    ("train.on_non_finite", "ignore", "one of stop, skip"),
    *(
        ("train.profile_steps", steps, "'' or FIRST:STOP with 1 <= FIRST < STOP, such as 100:105")
        for steps in ("5", "b:c", "7:7", "9:5", "0:5", "-1:5", "1:2:3", "3:", ":", "1:9999999999")
    ),
    ("train.time_limit", -1.0, "at least 0"),
    ("train.time_limit", float("inf"), "at least 0"),
    ("eval.split", "dev", "one of train, validation, test"),
    ("eval.batch_size", 0, "at least 1"),
    ("eval.max_windows", -1, "at least 0"),
    ("eval.num_samples", 0, "at least 1"),
    ("eval.num_orders", -1, "at least 0"),
    ("eval.metrics", "perplexity", "comma-separated, each once, of nelbo, importance_weighted"),
    ("eval.weights", "averaged", "one of ema, raw"),
    ("sample.num_texts", 0, "at least 1"),
    ("sample.schedule", "block", "one of ancestral, strided"),
    ("sample.length", -1, "at least 0"),
    ("sample.steps", -1, "at least 0"),
    ("sample.block_length", -1, "at least 0"),
    ("sample.draft_tokens", 1, "0 or in [2, 64]"),
    ("sample.draft_style", "tree", "one of chain, staircase"),
    ("sample.loop", "fast", "one of auto, plain, speculative, confidence"),
    ("sample.tokens_per_pass", 0, "at least 1"),
    ("sample.confidence_threshold", 1.0, "in [0, 1)"),
    ("sample.order", "best", "one of confidence, random, margin, entropy, left_to_right"),
    ("sample.order_temperature", -0.1, "at least 0"),
    ("sample.guidance", -0.1, "at least 0"),
    ("sample.eos", "always", "one of free, never, late"),
    ("sample.temperature", -0.1, "at least 0"),
    ("sample.top_p", 0.0, "in (0, 1]"),
    ("sample.top_p", 1.1, "in (0, 1]"),
    ("sample.top_k", -1, "at least 0"),
    ("sample.weights", "averaged", "one of ema, raw"),
    ("sample.weight_dtype", "int4", "one of auto, int8"),
    ("sample.cache_dtype", "int4", "one of auto, int8, float8_e4m3fn"),
]


def changed(**fields):
    config = default_config()
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in fields.items()})
    return config


def assert_refused(config, name, value, allowed):
    with pytest.raises(UserError) as error:
        validate(config)
    message = str(error.value)
    assert message.startswith(f"config.{name}={value!r}: must be ")
    assert allowed in message and "\n" not in message


@pytest.mark.parametrize(("name", "value", "allowed"), OUT_OF_RANGE)
def test_value_out_of_range_is_told(name, value, allowed):
    assert_refused(changed(**{name: value}), name, value, allowed)


def test_every_checked_field_has_a_bad_value_above():
    checked = {name for name, field in config_lib.fields().items() if field.check}
    assert checked == {name for name, _, _ in OUT_OF_RANGE} | {"objective"}


def test_numeric_fields_are_all_checked():
    numbers = {k for k, v in flat(default_config()).items() if type(v) in (int, float)}
    assert all(config_lib.fields()[name].check for name in numbers)


def test_unknown_objective_is_told_the_nearest():
    assert_refused(changed(objective="eso_c"), "objective", "eso_c", "one of ar, mdlm, bd3")
    with pytest.raises(UserError, match=r"did you mean 'eso_[ab]'\?"):
        validate(changed(objective="eso_c"))


@pytest.mark.parametrize(
    ("objective", "alpha_0", "allowed"), [("ar", 0.5, 0.0), ("mdlm", 0.5, 1.0), ("bd3", 0.0, 1.0)]
)
def test_alpha_0_that_the_objective_fixes(objective, alpha_0, allowed):
    assert_refused(
        changed(objective=objective, alpha_0=alpha_0),
        "alpha_0", alpha_0, f"{allowed} with objective {objective}",
    )  # fmt: skip
    validate(changed(objective=objective, alpha_0=allowed))


HALVES = {"diffusion": 0.5, "sequential": 0.5}


def test_low_variance_only_at_alpha_0_of_1():
    """In training; a model trained so may still be sampled at another alpha_0."""
    config = changed(low_variance=True, alpha_0=0.5)
    validate(config)
    with pytest.raises(UserError, match="low_variance=True: must be False unless alpha_0 is 1"):
        validate_training(config, HALVES, 1)
    validate_training(changed(low_variance=True, alpha_0=1.0), {"diffusion": 1.0}, 1)


@pytest.mark.parametrize(("width", "heads"), [(24, 8), (20, 4), (7, 1)])
def test_width_is_a_multiple_of_twice_the_heads(width, heads):
    config = changed(model__width=width, model__heads=heads)
    assert_refused(config, "model.width", width, f"multiple of 2 x model.heads = {2 * heads}")
    validate(changed(model__width=4 * heads, model__heads=heads))


def test_block_length_divides_seq_len_for_bd3_alone():
    fields = {"block_length": 5, "data__seq_len": 16}
    config = changed(objective="bd3", alpha_0=1.0, **fields)
    assert_refused(config, "block_length", 5, "a divisor of data.seq_len = 16")
    validate(changed(**fields))


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("train.steps", 10.0, "int"),
        ("train.steps", "10", "int"),
        ("train.steps", True, "int"),
        ("alpha_0", "0.5", "float"),
        ("low_variance", 1, "bool"),
        ("objective", 3, "str"),
        ("data.source", None, "str"),
    ],
)
def test_value_of_another_type_is_told(name, value, kind):
    section, _, last = name.rpartition(".")
    config = default_config()
    with config.ignore_type():
        (config[section] if section else config)[last] = value
    assert_refused(config, name, value, f"{kind}, not {type(value).__name__}")


def test_int_for_a_float_is_fine():
    config = default_config()
    with config.ignore_type():
        config.alpha_0 = 1
    validate(config)


def test_unknown_field_is_told_the_nearest():
    config = default_config()
    with config.unlocked():
        config.train.batchsize = 3
    with pytest.raises(UserError, match=r"config\.train\.batchsize: unknown.*'train.batch_size'"):
        validate(config)


def test_missing_field_is_told():
    config = default_config()
    with config.unlocked():
        del config.train.batch_size
    with pytest.raises(UserError, match=r"config\.train\.batch_size: missing"):
        validate(config)


@pytest.mark.parametrize(
    ("batch", "fractions", "accumulation", "devices"),
    [
        (8, HALVES, 1, 1),
        (16, HALVES, 2, 4),
        (8, {"ar": 1.0}, 1, 8),
        (10, {"a": 0.3, "b": 0.7}, 1, 1),
    ],
)
def test_batch_that_can_be_shared_out(batch, fractions, accumulation, devices):
    config = changed(train__batch_size=batch, train__grad_accumulation=accumulation)
    validate_training(config, fractions, devices)


@pytest.mark.parametrize(
    ("batch", "fractions", "accumulation", "devices", "told"),
    [
        (
            7,
            HALVES,
            1,
            1,
            "must give each loss a positive whole number of rows, but the diffusion loss gets 3.5 "
            "rows (kappa=0.5)",
        ),
        (8, {"a": 0.999, "b": 0.001}, 1, 1, "gets 7.992 rows"),
        (8, {"a": 1.0, "b": 1e-9}, 1, 1, "the b loss gets 8e-09 rows"),
        (
            8,
            HALVES,
            3,
            1,
            "must give each loss a multiple of train.grad_accumulation x devices (mesh.data x "
            "mesh.fsdp) = 3 x 1 rows, but the diffusion loss gets 4 rows (kappa=0.5)",
        ),
        (
            8,
            HALVES,
            1,
            8,
            "must give each loss a multiple of train.grad_accumulation x devices (mesh.data x "
            "mesh.fsdp) = 1 x 8 rows, but the diffusion loss gets 4 rows (kappa=0.5)",
        ),
        (
            16,
            HALVES,
            4,
            4,
            "must give each loss a multiple of train.grad_accumulation x devices (mesh.data x "
            "mesh.fsdp) = 4 x 4 rows, but the diffusion loss gets 8 rows (kappa=0.5)",
        ),
    ],
)
def test_batch_that_cannot_be_shared_out_is_told(batch, fractions, accumulation, devices, told):
    config = changed(train__batch_size=batch, train__grad_accumulation=accumulation)
    with pytest.raises(UserError) as error:
        validate_training(config, fractions, devices)
    message = str(error.value)
    assert message.startswith(f"config.train.batch_size={batch}: ") and told in message


# Every numeric field, with what no program can compute with.

NUMBERS = {k: v for k, v in flat(default_config()).items() if type(v) in (int, float)}
INTEGERS = [name for name, value in NUMBERS.items() if type(value) is int]
FLOATS = [name for name, value in NUMBERS.items() if type(value) is float]
NOT_FINITE = [float("nan"), float("inf"), -float("inf"), 1e39, -1e39, 1e-60, -1e-60, 10**39]


def with_any(name, value):
    """The default config with a field of any type."""
    config = default_config()
    section, _, last = name.rpartition(".")
    with config.ignore_type():
        (config[section] if section else config)[last] = value
    return config


@pytest.mark.parametrize("value", NOT_FINITE, ids=lambda value: str(value)[:6])
@pytest.mark.parametrize("name", FLOATS)
def test_float_is_finite_in_32_bits(name, value):
    with pytest.raises(UserError) as error:
        validate(with_any(name, value))
    assert str(error.value).startswith(f"config.{name}=") and "must be" in str(error.value)


@pytest.mark.parametrize("value", [2**32, 2**63, 10**30, -(2**31) - 1, -2])
@pytest.mark.parametrize("name", INTEGERS)
def test_integer_fits_32_bits(name, value):
    assert_refused(with_any(name, value), name, value, "")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e39, 3.0, True, None, "3"])
@pytest.mark.parametrize("name", INTEGERS)
def test_integer_is_an_integer(name, value):
    assert_refused(with_any(name, value), name, value, "must be int, not ")


@pytest.mark.parametrize("name", sorted(set(INTEGERS) - {"seed", "sample.seed"}))
def test_integer_has_an_upper_bound_that_is_told(name):
    """2**31 does not fit the counters of a program; seeds are of 32 bits without a sign."""
    with pytest.raises(UserError, match=rf"^config\.{name}=2147483648: must be .*\d"):
        validate(with_any(name, 2**31))


@pytest.mark.parametrize(
    "name", ["kappa", "model.dropout", "optimizer.b1", "optimizer.b2", "optimizer.ema_decay"]
)
def test_float_below_1_is_below_1_in_32_bits(name):
    """float32 rounds 1 - 1e-12 to 1, with which Adam divides zero by zero."""
    assert_refused(with_any(name, 1 - 1e-12), name, 1 - 1e-12, "when rounded to 32 bits (1)")


@pytest.mark.parametrize("name", ["train.batch_size", "data.seq_len", "optimizer.warmup_steps"])
def test_integer_of_the_largest_size_is_allowed(name):
    assert config_lib.is_allowed(name, 2**24)


@pytest.mark.parametrize(
    ("name", "value"),
    [("data.workers", 3000), ("model.blocks", 10**5), ("sample.num_texts", 10**8),
     ("sample.length", 10**9), ("eval.batch_size", 10**9), ("optimizer.warmup_steps", 2**31)],
)  # fmt: skip
def test_sizes_that_took_all_memory_or_time(name, value):
    assert_refused(with_any(name, value), name, value, "and at most ")
