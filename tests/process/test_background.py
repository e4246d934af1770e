"""Calls in a thread of their own."""

import threading

import pytest

from esolm_jax.process.background import Background


@pytest.mark.parametrize("in_thread", [True, False])
def test_result_and_error_of_a_call(in_thread):
    call = Background(threading.current_thread, in_thread=in_thread)
    assert (call.result() is threading.current_thread()) == (not in_thread)
    failed = Background(lambda: 1 // 0, in_thread=in_thread)
    with pytest.raises(ZeroDivisionError):
        failed.result()
