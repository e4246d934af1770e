"""FLOPs of attention kernels, against blocks counted by hand."""

import jax
import pytest

from esolm_jax import config as config_lib
from esolm_jax.aot.kernel_flops import kernel_flops
from esolm_jax.data.manifest import planned_tokenizer
from esolm_jax.model import build
from esolm_jax.parallel import sharding
from esolm_jax.training.train_step import Trainer

pytestmark = pytest.mark.fast_compile

LENGTH, BLOCK, WIDTH, ROWS, HEADS = 256, 64, 32, 8, 2


def training(objective, alpha_0, cond_width=16):
    config = config_lib.default_config()
    config.objective, config.alpha_0 = objective, alpha_0
    config.data.seq_len, config.data.vocab_size = LENGTH, 255
    config.model.update({"width": 64, "blocks": 1, "heads": HEADS, "cond_width": cond_width})
    config.model.dtype = "bfloat16"
    config.train.batch_size = ROWS
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    return Trainer(config, build.build_model(config, planned_tokenizer(config), mesh))


def flash(kernel, tokens):
    """A program of one kernel, over `tokens` padded to whole blocks."""
    blocks = tokens // BLOCK
    shapes = {
        "blocks": f"s32[{blocks},{blocks}]",
        "count": f"s32[{blocks}]",
        "q": f"bf16[{ROWS},{tokens},{HEADS},1,{WIDTH}]",
        "k": f"bf16[{ROWS},{tokens},{HEADS},{WIDTH}]",
    }
    parameters = [f"  %{name} = {s} parameter({n})" for n, (name, s) in enumerate(shapes.items())]
    call = (
        f"  ROOT %pallas_call.1 = {shapes['q']} custom-call(%blocks, %count, %q, %k, %k), "
        'custom_call_target="__gpu$xla.gpu.triton", '
        f'metadata={{op_name="jit(step)/attend/flash_{kernel}_kernel/pallas_call"}}'
    )
    body = "\n".join([*parameters, call])
    return f"HloModule m\n\nENTRY %main (q: f32[]) -> f32[] {{\n{body}\n}}\n"


def computed_blocks(trainer, kernel, products, tokens):
    """Blocks per row and head, from the FLOPs."""
    flops = kernel_flops(trainer, flash(kernel, tokens))["pallas_call.1"]
    return flops / (products * 2 * BLOCK**2 * WIDTH * ROWS * HEADS)


@pytest.mark.parametrize(("kernel", "products"), [("forward", 2), ("queries", 3), ("keys", 4)])
def test_causal_attention_computes_a_triangle_of_blocks(kernel, products):
    blocks = computed_blocks(training("ar", 0.0, cond_width=0), kernel, products, LENGTH)
    of_pairs = 2 * 2 + 2 * 4  # each program of two adjacent blocks of queries
    assert blocks == (of_pairs if kernel == "forward" else 4 * 5 / 2)


def test_query_copies_see_themselves_and_earlier_tokens():
    """α₀ = 0, no trimming: 4 blocks of copies on a diagonal, then twice a triangle. A program of
    the forward kernel has two blocks of queries, one of the keys' kernel one of keys."""
    trainer = training("eso_b", 0.0)
    assert computed_blocks(trainer, "keys", 4, 2 * LENGTH) == 4 + 2 * 10
    assert computed_blocks(trainer, "forward", 2, 2 * LENGTH) == 2 * (2 + 2) + 2 * 12


def test_labels_without_a_layout_are_drawn():
    """Eso-LM (A): a diffusion pass computes what some row sees, more than a triangle."""
    blocks = computed_blocks(training("eso_a", 0.5), "forward", 2, LENGTH)
    assert 10 < blocks <= 16


def test_kernel_of_another_length_is_not_counted():
    assert kernel_flops(training("ar", 0.0, cond_width=0), flash("forward", 4 * LENGTH)) == {}
