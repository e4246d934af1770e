"""Returns freed memory to the system at once (glibc)."""

import ctypes
import gc

import jax

_M_MMAP_THRESHOLD = -3  # of mallopt(3)


def return_what_is_freed(above: int = 2**20) -> None:
    """Gives arrays of more than `above` bytes memory mappings of their own from now on.

    By default, freed arrays of up to 32 MB stay in the heap: 80 MB after the restore of a 200 MB
    checkpoint. Without glibc, nothing changes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, above)


def release() -> None:
    """Drops all compiled programs (one may take 100 MB) and returns free memory to the system."""
    gc.collect()
    jax.clear_caches()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
