"""Objects by URL written and deleted. Torch-free."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from utils import storage_google as google
from utils.storage import PIECE, Info, at_once, info
from utils.storage_open import Cut, call, scheme


def write(url: str, content: bytes | Path, *, new: bool = False) -> Info:
    """Write one whole object, from memory or from a file, and compare size and checksum of what arrived.

    Raises: FileExistsError if `new` and there is one of another content: of the same, it is that of a first try whose
    answer was lost.
    """
    how: dict[str, Any] = {"mode": "create" if new else "overwrite"}
    if scheme(url) in google.SCHEMES:
        how["chunksize"] = PIECE

    def put(system: Any, path: str) -> Info:
        try:
            if isinstance(content, Path):
                system.put_file(str(content), path, **how)
            else:
                system.pipe_file(path, content, **how)
        except Exception as error:
            if not _is_refusal(error):
                raise
            if _holds(found := info(url), content):
                return found
            raise FileExistsError(f"{url}: exists already") from None
        if not _holds(found := info(url), content):
            raise Cut(f"not kept as it was sent: {found.size} bytes")
        return found

    return call(url, put)


def _is_refusal(error: BaseException | None) -> bool:
    """Whether it is that there is such an object; gcsfs may raise an error of ending the upload over that one."""
    return isinstance(error, FileExistsError) or (error is not None and _is_refusal(error.__context__))


def _holds(found: Info, content: bytes | Path) -> bool:
    size = content.stat().st_size if isinstance(content, Path) else len(content)
    if found.size != size or found.crc32c is None:
        return found.size == size
    if isinstance(content, bytes):
        return found.crc32c == google.crc32c([content])
    with open(content, "rb") as file:
        return found.crc32c == google.crc32c(iter(lambda: file.read(1 << 20), b""))


def delete(urls: Iterable[str]) -> None:
    """Delete objects; one that is gone already is no error."""

    def remove(system: Any, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            system.rm_file(path)

    at_once(lambda url: call(url, remove), list(urls))
