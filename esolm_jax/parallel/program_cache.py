"""One cache of compiled programs for all processes of a run, or none."""

import contextlib
import os
import pathlib
import sys
import uuid

from esolm_jax.parallel import distributed, multihost
from esolm_jax.process import compilation_cache


def keep_compiled_programs() -> None:
    """Compiled programs are kept in the user's folder, if all processes share it.

    GPUs of several processes choose their kernels together while they compile: if a process loaded
    the program from a folder that the others do not see, they would wait for it.
    """
    folder = None
    if not compilation_cache.is_configured():
        try:
            folder = compilation_cache.open_folder()
        except OSError as error:
            if distributed.is_main():
                print(f"note: compiled programs are not kept: {error}", file=sys.stderr)
    if _all_see(folder):
        compilation_cache.use(folder)


def _all_see(folder: pathlib.Path | None) -> bool:
    """Whether it is one folder in all processes: each sees a file that process 0 makes in it.
    None = this process has no folder. All processes make this call."""
    if not distributed.is_started():
        return folder is not None
    mark = (folder or pathlib.Path()) / f"seen-{multihost.from_main(uuid.uuid4().hex)}"
    if folder and distributed.is_main():
        with contextlib.suppress(OSError):
            mark.touch()
    multihost.gather("made")
    sees_it = folder is not None and os.path.exists(mark)
    answers = multihost.gather(str(sees_it))
    if folder and distributed.is_main():
        mark.unlink(missing_ok=True)
    return set(answers) == {str(True)}
