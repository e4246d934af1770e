"""Returns freed memory to the operating system immediately (glibc)."""

import ctypes
import gc

import jax

_M_MMAP_THRESHOLD = -3  # of mallopt(3)


def mmap_large_arrays(above: int = 2**20) -> None:
    """Allocates arrays of more than `above` bytes with mmap from now on.

    By default, freed arrays of up to 32 MB stay in the heap: 80 MB after the restore of a
    200 MB checkpoint (at d49df3b). Has no effect without glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, above)


def clear_jit_caches_and_trim() -> None:
    """Drops all compiled programs (up to 100 MB each) and returns free memory to the system."""
    gc.collect()
    jax.clear_caches()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
