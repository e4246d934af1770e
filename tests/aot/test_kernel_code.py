"""The GPU kernels of attention, as NVIDIA's assembler makes them."""

import pytest

from benchmarks import kernel_code
from benchmarks.kernel_code import Case


@pytest.mark.parametrize("case", [Case("h100", 64), Case("h100", 128), Case("a100", 128)], ids=str)
def test_products_of_attention_run_together(case):
    """A product that waits for the one before, or a register that is spilled, costs a half of the
    kernel's speed, and nothing else would show it without a GPU."""
    pytest.importorskip("jax_cuda12_plugin")
    codes = kernel_code.codes(case)
    assert len(codes) == 3
    assert not any(code.waits for code in codes.values())
    assert max(code.spilled for code in codes.values()) <= 64
