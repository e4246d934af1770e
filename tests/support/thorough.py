"""What needs more time than it is worth at every change: ESOLM_TEST_ALL=1 runs it, too.

It also has XLA compile as for users. By default it compiles quickly, for most of what tests run is
over sooner than it is compiled.
"""

import os

import pytest

ALL = os.environ.get("ESOLM_TEST_ALL") == "1"
thorough = pytest.mark.skipif(not ALL, reason="only with ESOLM_TEST_ALL=1")

# In the environment; the new emitters of fusions take most of the time to compile.
QUICK_XLA = {
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "XLA_FLAGS": "--xla_cpu_use_fusion_emitters=false",
}
