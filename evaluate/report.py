"""Evaluation reports: written by `evaluate.run`, read back here into one table.

    python -m evaluate.report runs/*/eval/eval_*.out

A report is text for people; its last lines are the same numbers as JSON and an end marker. One without the
marker (a copy cut off half-way) has no result, which is not AP 0. `n/a`: no ground truth of that size.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from utils.coco_names import METRICS, show
from utils.errors import InputError, cli

TITLE = "# COCO evaluation"
RESULT = "# result "
END = "# end of report"
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
    if text[: len(TITLE)] != TITLE[: len(text)]:
        raise InputError(f"{name}: not an evaluation report; give the eval_<jobid>.out files of evaluate.run")
    lines = text.rstrip("\n").split("\n")
    return json.loads(lines[-2].removeprefix(RESULT)) if lines[-1] == END else None


def summary(files: Iterable[Path]) -> str:
    """One aligned line per report. Raises: InputError when a file is missing or not a report."""
    rows: list[tuple[str, ...]] = [("file", "job", "epoch", "images", *METRICS)]
    for file in files:
        try:
            result = parse(file.read_text(errors="replace"), str(file))
        except OSError as error:
            raise InputError(f"{file}: {error.strerror}") from None
        if result is None:
            rows.append((str(file), "", "", "", "no result", *[""] * (len(METRICS) - 1)))
            continue
        numbers = (show(result["stats"][metric]) for metric in METRICS)
        rows.append((str(file), result["job"], str(result["epoch"]), str(result["images"]), *numbers))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _plain(value: Any) -> str:
    """A header's value on one line."""
    if isinstance(value, dict):
        value = [f"{key} {item}" for key, item in value.items()]
    return " ".join((", ".join(map(str, value)) if isinstance(value, list) else str(value)).split())


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="evaluate.report", description="Evaluation reports as one table.")
    parser.add_argument("files", nargs="+", type=Path, help="eval_<jobid>.out")
    print(summary(parser.parse_args(argv).files))


if __name__ == "__main__":
    cli(main)
