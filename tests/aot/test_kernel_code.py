"""The GPU kernels of attention, as NVIDIA's assembler makes them."""

import pytest

from benchmarks import kernel_code
from benchmarks.kernel_code import Case

SPILLED = {  # bytes at most
    Case("h100", 64): 0,
    Case("h100", 128): 64,
    Case("h100", 256): 128,
    Case("a100", 64): 300,
    Case("a100", 128): 64,
}


@pytest.mark.parametrize("case", SPILLED, ids=lambda case: case.name)
def test_products_of_attention_run_together(case):
    """A product that waits for the one before, or many registers that are spilled, cost a half of
    the kernel's speed, and nothing else would show it without a GPU."""
    pytest.importorskip("jax_cuda12_plugin")
    pytest.importorskip("nvidia.cuda_nvcc")
    codes = kernel_code.codes(case)
    assert len(codes) == 3
    assert not any(code.waits for code in codes.values())
    assert max(code.spilled for code in codes.values()) <= SPILLED[case]
