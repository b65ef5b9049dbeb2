"""An archive mounted by squashfuse, for programs that need files: each process has its own mount while it lives."""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import os
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

from utils import stop
from utils.archive import Archive
from utils.errors import EnvironmentProblem, InputError
from utils.squashfs_once import locked
from utils.tree import Folder

_held: dict[Path, tuple[int, int]] = {}  # mount point -> descriptor that holds its lock, process


def mount(archive: Archive, root: Path) -> Folder:
    """The archive's files below a new mount point in `root`, until this process ends.

    Raises: InputError if squashfuse is not installed; EnvironmentProblem if it cannot mount here.
    """
    program = shutil.which("squashfuse")
    if not program:
        raise InputError("data.stage=mount: no squashfuse here; install it (apt-get install squashfuse) or use direct")
    prefix = f"mount.{socket.gethostname()}."
    with locked(root / "mounts", "mounts in"):
        for left in root.glob(f"{prefix}*"):
            _remove_left(left)
        point = Path(tempfile.mkdtemp(prefix=prefix, dir=root))
        # Held while this process lives, or one that it forked: that is how others know that the mount is in use.
        holder = os.open(_lock_of(point), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(holder, fcntl.LOCK_EX)
    command = [program, "-o", "ro,nosuid,nodev", str(archive.path), str(point)]
    with stop.held_back():  # it inherits that, so that a signal for all processes of a step does not end the mount
        ended = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if ended.returncode or not os.path.ismount(point):
        _unmount(point)
        os.close(holder)
        reason = " / ".join(ended.stderr.split("\n")).strip(" /") or "no mount appeared"
        raise EnvironmentProblem(f"{archive}: squashfuse cannot mount it here: {reason}; use data.stage=direct")
    tree = Folder(point, fingerprint=archive.fingerprint)
    _held[tree.root] = holder, os.getpid()
    return tree


@atexit.register
def unmount_all() -> None:
    """End this process's mounts; a fork of it has none."""
    for point, (holder, process) in _held.items():
        if os.getpid() == process:
            _unmount(point)
            os.close(holder)
    _held.clear()


def _lock_of(point: Path) -> Path:
    return point.with_name(f".{point.name}.lock")


def _remove_left(point: Path) -> None:
    """Remove a mount point whose process has ended; leave one that is in use."""
    with contextlib.suppress(FileNotFoundError, BlockingIOError), open(_lock_of(point), "rb+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _unmount(point)


def _unmount(point: Path) -> None:
    program = shutil.which("fusermount3") or shutil.which("fusermount")
    command = [program, "-u", "-z"] if program else ["umount", "-l"]
    subprocess.run([*command, str(point)], stdin=subprocess.DEVNULL, capture_output=True)
    with contextlib.suppress(OSError):  # still mounted: the next process tries again
        point.rmdir()
        _lock_of(point).unlink()
