"""Many evaluation reports in one table: 100,000 in seconds, so files are read by system calls and hardly parsed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from evaluate.report import DAMAGED, NO_REPORT, SHOWN, is_report, is_result, result_line
from utils.coco_names import METRICS, show
from utils.errors import InputError

SEPARATOR = "\0"  # in no path
PIECE = 1 << 16  # bytes; more would be mapped and unmapped by each read
DECODER = json.JSONDecoder()


def summary(files: Iterable[Path | str]) -> Iterator[str]:
    """One aligned line per report; a folder stands for all reports below it, in the order of their paths.

    Raises: InputError when a file is missing, damaged or not a report, before the first line. Below a folder, what is
    called eval_*.out and is not a report is left out, Slurm calls logs so; a damaged report has no result there: one
    of them does not keep the others from being shown.
    """
    head = ("file", "job", "epoch", "images", *METRICS)
    rows = [SEPARATOR.join(head)]  # one text a row: of 100,000 rows the cells would be a million objects
    widths = [max(len(name), len(show(0.0))) for name in head]
    for given in files:
        before = len(rows)
        for file, is_named in (
            [(str(given), True)] if not os.path.isdir(given) else ((file, False) for file in below(given))
        ):
            cells = _cells(file, is_named)
            if cells:
                widths = list(map(max, widths, map(len, cells)))
                rows.append(SEPARATOR.join(cells))
        if len(rows) == before:
            raise InputError(f"{given}: no eval_<jobid>.out below it")
    return ("  ".join(map(str.ljust, row.split(SEPARATOR), widths)).rstrip() for row in rows)


def below(folder: Path | str) -> Iterator[str]:
    """Paths of all eval_*.out below a folder, in order; links to folders are not followed, hidden folders left out."""
    with os.scandir(folder) as entries:
        found = sorted((entry for entry in entries if entry.name[0] != "."), key=lambda entry: entry.name)
    for entry in found:
        if entry.is_dir(follow_symlinks=False):
            yield from below(entry.path)
        elif entry.name.startswith("eval_") and entry.name.endswith(".out"):
            yield entry.path


def _cells(file: str, is_named: bool) -> tuple[str, ...]:
    """A row of the table; none for another file that was not `is_named`. Raises: InputError."""
    try:
        content = _read(file)
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}") from None
    if not is_report(content):
        if is_named:
            raise InputError(f"{file}: {NO_REPORT}")
        return ()
    line = result_line(content)
    found = None if line is None else _shown(line)
    if found is None:
        if is_named and line is not None:
            raise InputError(f"{file}: {DAMAGED}")
        return (file, "", "", "", "no result", *[""] * (len(METRICS) - 1))
    shown = (str(found[name]) for name in ("job", "epoch", "images"))
    return (file, *shown, *(show(found["stats"][name]) for name in METRICS))


def _shown(line: str) -> dict[str, Any] | None:
    """Of the result, what the table shows; None when that cannot be read."""
    try:
        found = {name: _value(line, name) for name in SHOWN}
    except (ValueError, RecursionError):
        return None
    return found if is_result(found) else None


def _value(line: str, key: str) -> Any:
    """One of the result's values, in a fifth of the time that all take. A quote within a string is no such key's."""
    word = f'"{key}": '
    return DECODER.raw_decode(line, line.index(word) + len(word))[0]


def _read(file: str) -> bytes:
    """A file's content, without what `open` makes around it."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        parts = []
        while part := os.read(descriptor, PIECE):
            parts.append(part)
            if len(part) < PIECE:
                break
        return b"".join(parts)
    finally:
        os.close(descriptor)
