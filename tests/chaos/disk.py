"""The disk that holds runs/: a small one of its own, which can be full or read-only for a moment. Root only."""

from __future__ import annotations

import contextlib
import os
import subprocess
from pathlib import Path

SIZE = 5 << 30  # bytes; memory is taken only for what is there
TRIES = 1000


class Disk:
    """A tmpfs on the empty `folder`. Raises: OSError where that is not allowed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._mount("-t", "tmpfs", "-o", f"size={SIZE},mode=700", "tmpfs")

    def _mount(self, *words: str) -> None:
        done = subprocess.run(["mount", *words, self.folder], capture_output=True, text=True)
        if done.returncode:
            raise OSError(done.stderr.strip())

    def fill(self, left: int) -> None:
        """Leave room for no more than about `left` bytes. Raises: OSError if it is used up quicker than that."""
        for _ in range(TRIES):
            disk = os.statvfs(self.folder)
            with contextlib.suppress(OSError):  # a save is under way, there is more on it already
                return self._mount("-o", f"remount,size={(disk.f_blocks - disk.f_bfree) * disk.f_frsize + left}")
        raise OSError(f"{self.folder}: cannot be filled")

    def empty(self) -> None:
        """Room again."""
        self._mount("-o", f"remount,size={SIZE}")

    def freeze(self) -> None:
        """Read-only for whoever opens a file from now on; a file system with open files cannot be made so."""
        self._mount("--bind", str(self.folder))
        self._mount("-o", "remount,bind,ro")

    def thaw(self) -> None:
        subprocess.run(["umount", "--lazy", self.folder], check=True)

    def remove(self) -> None:
        while os.path.ismount(self.folder):
            self.thaw()
