"""What needs more time than it is worth at every change: ESOLM_TEST_ALL=1 runs it, too, and
compiles the programs of all modules as for users."""

import os

import pytest

ALL = os.environ.get("ESOLM_TEST_ALL") == "1"
thorough = pytest.mark.skipif(not ALL, reason="only with ESOLM_TEST_ALL=1")
