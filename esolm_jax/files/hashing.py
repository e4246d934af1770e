"""SHA-256 of files."""

import hashlib
import pathlib

_BUFFER = 2**18  # bytes: stays in a core's cache


def hash_file(path: pathlib.Path) -> tuple[int, str]:
    """Size and SHA-256 of a file, in bounded memory. OSError if it cannot be read."""
    digest, size = hashlib.sha256(), 0
    buffer = memoryview(bytearray(_BUFFER))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            size += count
    return size, digest.hexdigest()
