"""Whether a file system shows its locks to all hosts that mount it."""

import pathlib

_MOUNTS = pathlib.Path("/proc/self/mountinfo")
_SHARED_LOCKS = {  # file systems with locks that all hosts see
    *("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "jfs", "reiserfs", "bcachefs"),
    *("tmpfs", "ramfs", "overlay", "aufs", "apfs", "hfs", "ufs"),
    *("nfs", "nfs4", "lustre", "gpfs", "ceph", "beegfs", "gfs2", "ocfs2", "wekafs", "panfs"),
}
_LOCAL_OPTIONS = {"nolock", "local_lock=all", "local_lock=posix", "localflock", "noflock"}


def locks_are_shared(path: pathlib.Path, mounts: str | None = None) -> bool:
    """Whether locks on this file are visible to all hosts and containers that mount it."""
    mounts = _mounts() if mounts is None else mounts
    best, kind, options = "", "", ""
    for line in mounts.splitlines():
        left, _, right = line.partition(" - ")
        at, (name, *more) = left.split()[4], right.split()
        at = at.encode().decode("unicode_escape") if "\\" in at else at
        inside = path == pathlib.Path(at) or pathlib.Path(at) in path.parents
        if inside and len(at) >= len(best):  # a later mount hides an earlier one
            best, kind, options = at, name, ",".join([left.split()[5], *more])
    return kind in _SHARED_LOCKS and _LOCAL_OPTIONS.isdisjoint(options.split(","))


def _mounts() -> str:
    try:
        return _MOUNTS.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
