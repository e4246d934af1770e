"""One writer at a time: messages name the holder, and a lock ends with its process."""

import contextlib
import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from esolm_jax.errors import UserError
from esolm_jax.files import shared_locks, workdir_lock
from esolm_jax.files.lease import Lease
from esolm_jax.files.workdir_lock import Lock, hold
from esolm_jax.interop.published import read as published_read

pytestmark = pytest.mark.fast_compile

ROOT = str(pathlib.Path(__file__).parents[2])
PREAMBLE = """
import os, pathlib, sys, time
from esolm_jax.files.workdir_lock import hold
from esolm_jax.errors import UserError
folder = pathlib.Path(sys.argv[1])
"""
HOLD = "with hold(folder, name='--workdir=w'): print('held', flush=True); time.sleep(60)"


def start(folder, script=HOLD):
    return subprocess.Popen(
        [sys.executable, "-c", PREAMBLE + textwrap.dedent(script), str(folder)],
        env=os.environ | {"PYTHONPATH": ROOT},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@contextlib.contextmanager
def holder(folder, script=HOLD):
    """A process that holds the lock until the end."""
    process = start(folder, script)
    try:
        assert process.stdout.readline() == "held\n", process.communicate()
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def quick(monkeypatch):
    """Short times, and a file system whose locks other hosts do not see."""
    monkeypatch.setattr(workdir_lock, "REFRESH", 0.1)
    monkeypatch.setattr(workdir_lock, "STALE", 1.0)
    monkeypatch.setattr(workdir_lock, "SETTLE", 0.05)
    monkeypatch.setattr(workdir_lock, "locks_are_shared", lambda path: False)


@pytest.fixture
def no_locks(monkeypatch, quick):
    """A file system without locks."""
    monkeypatch.setattr(Lock, "_try_lock", lambda self: None)


def lease_of(folder) -> dict:
    return json.loads((folder / ".lock.json").read_text())


def write_lease(folder, **changes) -> Lease:
    """A lease, by default of a living process of another host."""
    lease = Lease.of_this_process()
    fields = vars(lease) | {"host": "elsewhere", "machine": "elsewhere", "pid": 7} | changes
    folder.mkdir(exist_ok=True)
    (folder / ".lock.json").write_text(json.dumps(fields))
    return Lease(**fields)


def test_the_second_is_told_who_holds_it_and_may_follow(tmp_path):
    with hold(tmp_path / "w", name="--workdir=w") as lock:
        refused = start(tmp_path / "w", HOLD).communicate(timeout=60)[1]
        assert (
            f"process {os.getpid()} on host {lock.lease.host} since {lock.lease.since}" in refused
        )
        assert "UserError: --workdir=w: another run is writing here" in refused
        assert shlex.join(sys.orig_argv)[:20] in refused  # the command
        with pytest.raises(UserError, match="this process itself"):
            with hold(tmp_path / "w", name="--workdir=w"):
                pass
    assert not (tmp_path / "w").exists()  # nothing was written
    with hold(tmp_path, name="--workdir=w"):
        assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", ".lock.json"]
    assert not list(tmp_path.iterdir())


def test_killed_again_and_again(tmp_path, capsys):
    """No wait for a lock whose process is dead, nor for its children, which live on."""
    script = """
    import subprocess
    from multiprocessing import get_context
    with hold(folder, name='--workdir=w'):
        child = subprocess.Popen(["sleep", "20"], close_fds=False, stdout=subprocess.DEVNULL)
        get_context("fork").Process(target=time.sleep, args=(20,)).start()
        print("held", flush=True)
        time.sleep(60)
    """
    for count in range(3):
        process = start(tmp_path, script)
        assert process.stdout.readline() == "held\n"
        lease = lease_of(tmp_path)
        process.send_signal(signal.SIGKILL)  # not waited for: it may still be dying
        with hold(tmp_path, name="--workdir=w"):
            assert capsys.readouterr().out.startswith(
                f"--workdir=w: taken over from a run that died (process {lease['pid']} on host "
            ), count
            assert lease_of(tmp_path)["pid"] == os.getpid()
        process.stdout.close()
        process.stderr.close()
        process.wait()


def test_of_many_that_start_at_once_one_gets_it(tmp_path):
    script = """
    while not (folder / "go").exists(): time.sleep(0.001)
    try:
        with hold(folder, name="--workdir=w"):
            with open(folder / "winners", "a") as file: file.write(f"{os.getpid()}\\n")
            time.sleep(4)
    except UserError as error:
        print(error)
    """
    processes = [start(tmp_path, script) for _ in range(6)]
    time.sleep(1.5)
    (tmp_path / "go").touch()
    texts = [process.communicate(timeout=60) for process in processes]
    (winner,) = (tmp_path / "winners").read_text().split()
    for process, (out, err) in zip(processes, texts, strict=True):
        assert not err
        if process.pid != int(winner):
            assert f"another run is writing here (process {winner} on host " in out


def test_a_process_id_that_was_given_to_another(tmp_path, capsys):
    mine = Lease.of_this_process()
    write_lease(tmp_path, host=mine.host, machine=mine.machine, pid=os.getpid(), started="1")
    with hold(tmp_path, name="--workdir=w"):
        assert "taken over" in capsys.readouterr().out


@pytest.mark.parametrize("filesystem", ["quick", "no_locks"])
def test_a_lease_of_another_host(tmp_path, capsys, filesystem, request):
    """A lease is valid while it changes, independent of clocks; else it becomes stale."""
    request.getfixturevalue(filesystem)
    lease = write_lease(tmp_path, since="2999-01-01 00:00:00 +0000")
    done = threading.Event()

    def beat():
        for number in range(1, 1000):
            if done.wait(0.3):
                return
            write_lease(tmp_path, token=lease.token, beat=number)

    thread = threading.Thread(target=beat)
    thread.start()
    with pytest.raises(UserError, match="another run is writing here .process 7 on host elsewhere"):
        with hold(tmp_path, name="--workdir=w"):
            pass
    done.set()
    thread.join()
    assert "waiting up to 1 s to see whether" in capsys.readouterr().out
    with hold(tmp_path, name="--workdir=w") as lock:
        assert "taken over from a run that died (process 7 on host elsewhere" in (
            capsys.readouterr().out
        )
        before = lease_of(tmp_path)
        time.sleep(0.5)
        after = lease_of(tmp_path)
        assert before["token"] == after["token"] == lock.lease.token
        assert after["beat"] > before["beat"]
        lock.check()


def test_where_locks_are_shared_a_dead_host_is_not_waited_for(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(workdir_lock, "locks_are_shared", lambda path: True)
    write_lease(tmp_path)
    begin = time.monotonic()
    with hold(tmp_path, name="--workdir=w"):
        assert "taken over from a run that died" in capsys.readouterr().out
    assert time.monotonic() - begin < workdir_lock.STALE / 2


def test_without_locks_the_lease_alone_keeps_others_out(tmp_path, no_locks):
    with hold(tmp_path, name="--workdir=w"):
        # Of this host, whose processes can be asked for.
        with pytest.raises(UserError, match=f"process {os.getpid()} on host"):
            Lock(tmp_path.resolve() / ".lock", "--workdir=w").acquire()


def test_a_lost_lock_ends_the_run(tmp_path, quick):
    with hold(tmp_path, name="--workdir=w") as lock:
        write_lease(tmp_path, token="another")
        end = time.monotonic() + 10
        while not lock._lost and time.monotonic() < end:
            time.sleep(0.05)
        with pytest.raises(UserError, match="taken over by another run .process 7 on host elsewh"):
            lock.check()
    assert lease_of(tmp_path)["token"] == "another"  # which is not ours to delete


def test_a_deleted_lock_is_taken_again_or_lost(tmp_path, quick):
    with hold(tmp_path, name="--workdir=w") as lock:
        for path in tmp_path.iterdir():
            path.unlink()
        time.sleep(0.5)
        lock.check()
        assert lock._is_ours() and lease_of(tmp_path)["token"] == lock.lease.token
        (tmp_path / ".lock").unlink()
        lost = "with hold(folder, name='w'): print('held', flush=True); time.sleep(60)"
        (tmp_path / ".lock.json").unlink()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Lock, "_refresh", lambda self: "")  # asleep while another begins
            time.sleep(0.3)
            with contextlib.suppress(FileNotFoundError):
                (tmp_path / ".lock").unlink()
            with contextlib.suppress(FileNotFoundError):
                (tmp_path / ".lock.json").unlink()
            process = start(tmp_path, lost)
            assert process.stdout.readline() == "held\n"
        time.sleep(0.5)
        with pytest.raises(UserError, match=f"taken over by another run .process {process.pid} "):
            lock.check()
        process.kill()
        process.communicate()


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        with hold(tmp_path / "file" / "w", name="--workdir=w"):
            pass
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / ".lock").symlink_to(tmp_path / "file")  # somebody else's
    with pytest.raises(OSError, match="symbolic link"):
        with hold(tmp_path / "w", name="--workdir=w"):
            pass
    with pytest.raises(OSError, match="/proc"):
        with hold(pathlib.Path("/proc/self"), name="--workdir=w"):
            pass


MOUNTS = """\
21 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda rw
22 21 0:40 / /home rw,relatime - nfs4 server:/home rw,vers=4.2,local_lock=none
23 21 0:41 / /scratch rw,relatime - nfs server:/scratch rw,vers=3,nolock
24 21 0:42 / /mnt/bucket rw,nosuid - fuse.gcsfuse bucket rw,user_id=0
25 21 0:43 / /mnt/my\\040disk rw - virtiofs share rw
"""


@pytest.mark.parametrize(
    "path, shared",
    [
        ("/tmp/w", True),
        ("/home/me/w", True),
        ("/scratch/w", False),
        ("/mnt/bucket/w", False),
        ("/mnt/bucketful/w", True),
        ("/mnt/my disk/w", False),
    ],
)
def test_which_file_systems_share_their_locks(path, shared):
    assert shared_locks.locks_are_shared(pathlib.Path(path), MOUNTS) == shared


def test_what_a_killed_writer_left_does_not_make_a_workdir_full(tmp_path):
    for name in (workdir_lock.FILE, f"{workdir_lock.FILE}.json", f"{workdir_lock.FILE}.json.0a1b"):
        (tmp_path / name).touch()
    published_read.check_empty(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="but holds checkpoints"):
        published_read.check_empty(tmp_path)
