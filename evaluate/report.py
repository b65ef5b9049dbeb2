"""Evaluation reports: written by `evaluate.run`, read back here into one table.

    python -m evaluate.report runs/*/eval/eval_*.out
    python -m evaluate.report runs                                every eval_*.out below it
    python -m evaluate.report runs/mocov2_fpn -o report.html      a page about a chain, see evaluate/page.py

A report is text for people; its last lines are the same numbers as JSON and an end marker. One without the
marker (a copy cut off half-way) has no result, which is not AP 0. `n/a`: no ground truth of that size.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from utils.coco_names import METRICS, show
from utils.errors import InputError, cli

TITLE = "# COCO evaluation"
RESULT = "# result "
END = "# end of report"
LAST = f"\n{END}".encode()
NO_REPORT = "not an evaluation report; give the eval_<jobid>.out files of evaluate.run"
SEPARATOR = "\0"  # in no path
PIECE = 1 << 16  # bytes; more would be mapped and unmapped by each read
DECODER = json.JSONDecoder()
NUMBERS = ("stats", "per_class")  # of the result, shown as tables; everything else is a line of the header


def render(result: dict[str, Any], table: str) -> str:
    """The report's text.

    Args:
        result: what metrics.json holds: `stats`, `per_class`, and the header's values by name.
        table: the twelve lines as COCO prints them.
    """
    header = [f"# {name}: {_plain(value)}" for name, value in result.items() if name not in NUMBERS]
    width = max(map(len, result["per_class"]))
    classes = [f" {name:<{width}}  {show(value)}" for name, value in sorted(result["per_class"].items())]
    lines = [TITLE, *header, "", table, "", "# AP per class", *classes, "", RESULT + json.dumps(result), END]
    return "\n".join(lines) + "\n"


def parse(text: str, name: str) -> dict[str, Any] | None:
    """The result in a report's text, number for number; None when the report is not complete.

    Raises: InputError naming `name` when the text is not (the beginning of) a report.
    """
    content = text.encode(errors="replace")
    if not _is_report(content):
        raise InputError(f"{name}: {NO_REPORT}")
    line = _result(content)
    return None if line is None else json.loads(line)


def _is_report(content: bytes) -> bool:
    """Whether it is one, or the beginning of one."""
    return content[: len(TITLE)] == TITLE[: len(content)].encode()


def _result(content: bytes) -> str | None:
    """The line of the result, as JSON; None when the report is not complete. The rest is not decoded."""
    content = content.rstrip(b"\n")
    if not content.endswith(LAST):
        return None
    end = len(content) - len(LAST)
    return content[content.rindex(b"\n", 0, end) + 1 : end].decode(errors="replace").removeprefix(RESULT)


def summary(files: Iterable[Path | str]) -> Iterator[str]:
    """One aligned line per report; a folder stands for all reports below it, in the order of their paths.

    Raises: InputError when a file is missing or not a report, before the first line. Below a folder, what is called
    eval_*.out and is not a report is left out: Slurm calls logs so.
    """
    head = ("file", "job", "epoch", "images", *METRICS)
    rows = [SEPARATOR.join(head)]  # one text a row: of 100,000 rows the cells would be a million objects
    widths = [max(len(name), len(show(0.0))) for name in head]
    for given in files:
        for file, is_named in (
            [(str(given), True)] if not os.path.isdir(given) else ((file, False) for file in below(given))
        ):
            cells = _cells(file, is_named)
            if cells:
                widths = list(map(max, widths, map(len, cells)))
                rows.append(SEPARATOR.join(cells))
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
    if not _is_report(content):
        if is_named:
            raise InputError(f"{file}: {NO_REPORT}")
        return ()
    line = _result(content)
    if line is None:
        return (file, "", "", "", "no result", *[""] * (len(METRICS) - 1))
    stats = _value(line, "stats")
    shown = (str(_value(line, name)) for name in ("job", "epoch", "images"))
    return (file, *shown, *(show(stats[name]) for name in METRICS))


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


def _plain(value: Any) -> str:
    """A header's value on one line."""
    if isinstance(value, dict):
        value = [f"{key} {item}" for key, item in value.items()]
    return " ".join((", ".join(map(str, value)) if isinstance(value, list) else str(value)).split())


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="evaluate.report", description="Evaluation reports: a table, or a page.")
    parser.add_argument("files", nargs="+", type=Path, help="eval_<jobid>.out, or folders: all below them")
    parser.add_argument("-o", "--output", type=Path, metavar="HTML", help="a page about one chain's directory instead")
    parser.add_argument("--reference", help="for the page: a name of evaluate/references.yaml, or a metrics.json")
    given = parser.parse_args(argv)
    if given.output is None:
        if given.reference:
            parser.error("--reference is for the page: -o report.html")
        for line in summary(given.files):
            print(line)
        return
    if len(given.files) > 1:
        parser.error("-o: one chain's directory")
    from evaluate import page  # its libraries take a second

    print(page.write(given.files[0], given.output, given.reference))


if __name__ == "__main__":
    cli(main)
