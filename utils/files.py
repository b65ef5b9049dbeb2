"""Files that are whole or not there: atomic writes, hashes, locks between processes."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import io
import json
import os
import re
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from utils.errors import EnvironmentProblem, InputError


class _Hashed(io.RawIOBase):
    """Hashes and counts what is written to `file`, in order: it cannot be sought in.

    After an error of the disk it takes the rest and only counts: libraries in between hide the error, and how
    much room was needed is known at the end.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.size, self.digest = file, 0, hashlib.sha256()
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self.size += len(view)
        if not self.error:
            try:
                self.file.write(view)
                self.digest.update(view)
            except OSError as error:
                self.error = error
        return len(view)


def write_atomic(
    path: Path,
    write: Callable[[BinaryIO], object],
    before_rename: Callable[[str], object] | None = None,
    *,
    mode: int = 0o666,
) -> str:
    """Let `write` fill a temporary file beside `path`, then rename it into place. Returns the sha256 of the content.

    Either the old content or the whole new one is there after a crash or a full disk: the data
    and the directory entry are both flushed before this returns. `before_rename` is called with the sha256
    when all is on the disk and nothing of it under its name. Its permissions are what the umask leaves of `mode`.

    Raises: EnvironmentProblem when the disk is full or read-only; any other OSError of the write; what
    `before_rename` raises. The temporary file is gone then and `path` is untouched.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    size = 0
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as raw:
                file = _Hashed(raw)
                write(cast(BinaryIO, file))
                size = file.size
                if file.error:
                    raise file.error
                raw.flush()
                os.fsync(raw.fileno())
            if before_rename:
                before_rename(file.digest.hexdigest())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _flush_directory(path.parent)
    except OSError as error:
        if reason := _disk_problem(error, path, size):
            raise EnvironmentProblem(reason) from error
        raise
    return file.digest.hexdigest()


def _flush_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _disk_problem(error: OSError, path: Path, size: int) -> str | None:
    """What the disk has against a file of `size` bytes, if it is the disk."""
    needs = f"{path} needs about {size / 2**20:.1f} MiB"
    if error.errno == errno.ENOSPC:
        free = free_space(next(folder for folder in path.parents if folder.exists()))
        return f"disk full: {needs}, has {free / 2**20:.1f} MiB free"
    if error.errno == errno.EDQUOT:
        return f"disk quota used up: {needs}"
    return f"read-only file system: {path}" if error.errno == errno.EROFS else None


def free_space(directory: Path) -> int:
    """Bytes that this user may still write on the disk of a directory."""
    disk = os.statvfs(directory)
    return disk.f_bavail * disk.f_frsize


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` atomically."""
    write_atomic(path, lambda file: file.write(text.encode()))


def write_new(path: Path, text: str) -> bool:
    """Write `text` to `path`, whole, unless there is a file; whether this process was the one, of all on all nodes."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    write_text(temporary, text)
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        temporary.unlink()
    return True


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` atomically, as indented JSON."""
    write_text(path, json.dumps(value, indent=2, sort_keys=False) + "\n")


def sha256(path: Path, progress: Callable[[int], object] = lambda done: None) -> str:
    """Hex SHA-256 of a file's content. `progress` is told the bytes of each piece."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            progress(len(block))
    return digest.hexdigest()


def read_sha256(file: Path) -> str | None:
    """The first hash in a file such as sha256sum writes; None if there is no file. Raises: InputError."""
    try:
        text = file.read_text(errors="replace")
    except FileNotFoundError:
        return None
    match = re.match(r"\\?([0-9a-fA-F]{64})(\s|$)", text)
    if not match:
        raise InputError(f"{file}: does not begin with a sha256, as sha256sum writes it; correct or remove it")
    return match[1].lower()


@contextlib.contextmanager
def lock(path: Path, blocking: bool = True) -> Iterator[None]:
    """Hold an exclusive lock between processes of one node (`flock`); freed by the kernel on death.

    Raises: BlockingIOError when not `blocking` and another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if blocking else fcntl.LOCK_NB))
        yield
