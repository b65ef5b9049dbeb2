"""The two ways to unpack a squashfs archive, the checks before, and what is needed around them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from utils.errors import EnvironmentProblem, InputError
from utils.progress import Progress
from utils.squashfs_once import say
from utils.squashfs_reader import Reader

PAGE = 4096  # what even a tiny file takes on disk
MARGIN = 1.02  # of the space needed, for directories and block lists


def check(archive: Path, reader: Reader, folder: Path) -> tuple[int, int]:
    """Number and bytes of the archive's files, if they are harmless and fit on `folder`'s disk."""
    files = size = pages = 0
    for entry in reader.safe_walk():
        files += entry.kind != "directory"
        size += entry.size
        pages += -(-entry.size // PAGE)
    disk = os.statvfs(folder)
    needed, free = pages * PAGE * MARGIN, disk.f_bavail * disk.f_frsize
    if needed > free:
        raise EnvironmentProblem(
            f"{archive} needs {needed / 2**30:.2f} GiB unpacked, {folder} has {free / 2**30:.2f} GiB free"
        )
    if disk.f_files and files > disk.f_favail:  # 0: a file system without a fixed number of inodes
        raise EnvironmentProblem(f"{archive} has {files} files, {folder} has {disk.f_favail} inodes free")
    return files, size


def extract(archive: Path, reader: Reader, tree: Path, size: int) -> None:
    """Write the archive's content, `size` bytes, as the new folder `tree`: by `unsquashfs` if it is there."""
    with Progress(f"unpack {archive.name}", size, "B") as progress:
        if program := shutil.which("unsquashfs"):
            _run_unsquashfs(program, archive, tree, progress)
        else:
            say("no unsquashfs here: unpacking with the Python reader, which is slower")
            _extract(reader, tree, progress)


def _run_unsquashfs(program: str, archive: Path, tree: Path, progress: Progress) -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    about = subprocess.run([program, "-version"], capture_output=True, text=True).stdout
    version = re.search(r"version (\d+)\.(\d+)", about)
    command = [program, "-no-progress", "-no-xattrs", "-processors", str(cores), "-d", str(tree)]
    if version and (int(version[1]), int(version[2])) >= (4, 5):
        command.append("-strict-errors")
    command.append(str(archive))
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        try:
            while process.poll() is None:
                progress.update(min(_written(process.pid), progress.total) - progress.done)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.2)
        finally:
            process.kill()
            process.wait()
        if process.returncode:
            output.seek(0)
            lines = output.read().decode(errors="replace").splitlines()
            text = " / ".join([line for line in lines if line.strip()][-6:])
            problem = EnvironmentProblem if re.search("No space left|quota", text) else InputError
            raise problem(f"{archive}: unsquashfs ended with {process.returncode}: {text}")
    progress.update(progress.total - progress.done)


def _written(pid: int) -> int:
    """Bytes a running process has written; 0 where the system does not tell."""
    with contextlib.suppress(OSError):
        if match := re.search(r"^wchar: (\d+)", Path(f"/proc/{pid}/io").read_text(), re.MULTILINE):
            return int(match[1])
    return 0


def _extract(reader: Reader, tree: Path, progress: Progress) -> None:
    tree.mkdir()
    for entry in reader.walk():
        path = os.path.join(tree, entry.path)
        if entry.kind == "directory":
            os.mkdir(path)
        elif entry.kind == "symlink":
            os.symlink(entry.target, path)
        else:
            with open(path, "xb") as file:
                for chunk in reader.read(entry):
                    file.write(chunk)
                    progress.update(len(chunk))
            os.chmod(path, entry.mode & 0o777)
            os.utime(path, (entry.mtime, entry.mtime))


def tally(tree: Path) -> tuple[int, int]:
    """Number and bytes of the files below `tree`; makes its folders private, writable and so removable."""
    files = size = 0
    pending = [os.fspath(tree)]
    while pending:
        folder = pending.pop()
        os.chmod(folder, 0o700)
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    pending.append(entry.path)
                else:
                    files += 1
                    size += 0 if entry.is_symlink() else entry.stat(follow_symlinks=False).st_size
    return files, size


def remove(folder: Path) -> None:
    tally(folder)
    shutil.rmtree(folder)


def flush(tree: Path) -> None:
    """Have the data on disk before the marker says so: a node may lose power right after."""
    if sys.platform == "linux":  # not os.sync(), which would wait for every other file system too
        descriptor = os.open(tree, os.O_RDONLY)
        try:
            if ctypes.CDLL(None, use_errno=True).syncfs(descriptor):
                raise OSError(ctypes.get_errno(), f"syncfs: {os.strerror(ctypes.get_errno())}")
        finally:
            os.close(descriptor)
