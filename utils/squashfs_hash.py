"""Which data it was: the sha256 of an archive, compared with every one that was written down for it.

squashfs has no checksum over its data: with one flipped bit an archive unpacks without a word, and wrong.
"""

from __future__ import annotations

from pathlib import Path

from utils import files
from utils.errors import InputError


def compare(archive: Path | str, digest: str, record: Path | None) -> None:
    """Raise InputError if `digest` is not what is written in `<archive>.sha256` beside it, or in `record`.

    Of data at a URL only with `record`: see `squashfs_remote`.
    """
    beside = archive.with_name(f"{archive.name}.sha256") if isinstance(archive, Path) else None
    if beside and (known := files.read_sha256(beside)) and known != digest:
        raise InputError(
            f"{archive}: damaged or exchanged: its sha256 is {digest}, {beside} says {known}; copy it again"
        )
    if record and (known := files.read_sha256(record)) and known != digest:
        what = "archive" if beside else "data"
        raise InputError(
            f"{archive}: not the {what} this chain began with: its sha256 is {digest}, was {known}; put that one "
            f"back, give the chain another --name, or remove {record} to accept the change"
        )


def settle(archive: Path | str, digest: str, record: Path | None) -> None:
    """Compare with what is written, and write to `record` if nothing is. Raises: InputError."""
    compare(archive, digest, record)
    if record and not record.exists() and not files.write_new(record, f"{digest}  {archive}\n"):
        compare(archive, digest, record)  # only one of several nodes can be the first
