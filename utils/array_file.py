"""Arrays in a file of this user alone, read at once: for what can be made again when anything is wrong with it.

    8 hexadecimal digits: CRC-32 of all that follows, end of line
    JSON: key, words, arrays [[name, dtype, shape], ...], end of line
    the arrays, each at a multiple of 64 bytes

A zip of eight members, as numpy writes, takes four times as long to read.
"""

from __future__ import annotations

import json
import os
import stat
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from utils import files

ALIGNED = 64
CRC = 9  # bytes of the first line


def save(path: Path, key: str, words: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays of numbers, and `words` that JSON can hold, atomically. `key` says what they were made of."""
    kinds = [(name, array.dtype.str, array.shape) for name, array in arrays.items()]
    head = json.dumps({"key": key, "words": words, "arrays": kinds}).encode()
    parts = [head + b" " * (-(CRC + len(head) + 1) % ALIGNED) + b"\n"]
    for array in arrays.values():
        parts += [array.tobytes(), bytes(-array.nbytes % ALIGNED)]
    content = b"".join(parts)
    files.write_atomic(path, lambda file: file.write(b"%08x\n%b" % (zlib.crc32(content), content)), mode=0o600)


def load(path: Path, key: str) -> dict[str, Any] | None:
    """Words and arrays by name, as they were saved under `key`; the arrays can be written to.

    None if there is no such file, if it has another key or is damaged, or if somebody else could have written it.
    """
    try:
        content = _content(path)
        if content[:CRC] != b"%08x\n" % zlib.crc32(memoryview(content)[CRC:]):
            return None
        start = content.index(b"\n", CRC) + 1
        head = json.loads(content[CRC:start])
        if head["key"] != key:
            return None
        found: dict[str, Any] = dict(head["words"])
        for name, kind, shape in head["arrays"]:
            array = np.frombuffer(content, kind, int(np.prod(shape)), start).reshape(shape)
            found[name] = array
            start += array.nbytes + -array.nbytes % ALIGNED
        return found
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _content(path: Path) -> bytearray:
    """Raises: OSError, also for a link; ValueError if it is not a file that only this user writes."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # opening a FIFO would wait for ever
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
            raise ValueError("not a file of this user alone")
        content = bytearray(status.st_size)
        content[file.readinto(content) :] = b""
    return content
