"""One process of a node does the work for an archive, the others wait and find it done."""

from __future__ import annotations

import contextlib
import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from utils import env
from utils.files import lock


def say(text: str) -> None:
    """Tell the user, once per node: every rank of a job stages, one of them does the work."""
    if env.world().local_rank == 0:
        print(text, file=sys.stderr, flush=True)


def identity(archive: Path) -> dict[str, Any]:
    """What shows, without reading it, that an archive is the one that was hashed."""
    status = archive.stat()
    return {"archive": str(archive), "size": status.st_size, "mtime_ns": status.st_mtime_ns}


def key(text: str) -> str:
    """A short name for something long."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@contextlib.contextmanager
def locked(dest: Path, does: str) -> Iterator[None]:
    """Alone on this node with `dest`; who has to wait says for what: another process that `does` this."""
    path = dest.with_name(f".{dest.name}.lock")
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(lock(path, blocking=False))
        except BlockingIOError:
            say(f"waiting for another process that {does} {dest}")
            stack.enter_context(lock(path))
        yield
