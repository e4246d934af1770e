"""Hashes of files.

SHA-256 identifies content, also against tampering. XXH3-128 detects damage: it is not
cryptographic, and hashes at the speed of memory. Files are read, not mapped: an I/O error on a
mapped page would end the process with SIGBUS.
"""

import hashlib
import os
import pathlib

import xxhash

ALGORITHMS = {"sha256": hashlib.sha256, "xxh3_128": xxhash.xxh3_128}
_BUFFER = 2**20  # bytes: stays in a core's L2 cache; reading and hashing it release the GIL


def hash_file(path: pathlib.Path, algorithm: str = "sha256") -> tuple[int, str]:
    """Size and hash of a file, in bounded memory. OSError if it cannot be read."""
    digest, size = ALGORITHMS[algorithm](), 0
    with open(path, "rb", buffering=0) as file:
        buffer = memoryview(bytearray(min(_BUFFER, os.fstat(file.fileno()).st_size) or 1))
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            size += count
    return size, digest.hexdigest()
