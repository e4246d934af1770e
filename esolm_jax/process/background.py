"""A call in a thread of its own."""

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Background(Generic[T]):
    """Begins call() at once. The process may end before the call does.

    Args:
      in_thread: False: the call is made here, before anything else.
    """

    def __init__(self, call: Callable[[], T], *, in_thread: bool = True):
        self._call = call
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        if in_thread:
            self._thread.start()
        else:
            self._run()

    def _run(self) -> None:
        try:
            self._value = self._call()
        except BaseException as error:  # raised where the value is needed
            self._error = error

    def result(self) -> T:
        """Waits for the value of the call, or raises what the call raised."""
        if self._thread.ident is not None:
            self._thread.join()
        if self._error is not None:
            raise self._error
        return self._value
