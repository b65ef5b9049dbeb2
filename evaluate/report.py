"""Evaluation reports, as `evaluate.run` writes them and as they are read back; tables and pages of them.

    python -m evaluate.report runs/*/eval/eval_*.out
    python -m evaluate.report runs                                every eval_*.out below it
    python -m evaluate.report runs/mocov2_fpn -o report.html      a page about a chain, see evaluate/page.py

A report is text for people; its last lines are the same numbers as JSON and an end marker. One without the
marker (a copy cut off half-way) has no result, which is not AP 0. `n/a`: no ground truth of that size.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from utils.coco_names import METRICS, show
from utils.errors import InputError, cli

TITLE = "# COCO evaluation"
RESULT = "# result "
END = "# end of report"
LAST = f"\n{END}".encode()
NO_REPORT = "not an evaluation report; give the eval_<jobid>.out files of evaluate.run"
DAMAGED = "damaged: it has its end, but no result that can be read; evaluate again"
SHOWN: dict[str, type] = {"job": str, "epoch": int, "images": int, "stats": dict}  # in a table of many reports
KINDS = [*SHOWN.values()]
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

    Raises: InputError naming `name` when the text is not (the beginning of) a report, or its result cannot be read.
    """
    content = text.encode(errors="replace")
    if not is_report(content):
        raise InputError(f"{name}: {NO_REPORT}")
    line = result_line(content)
    if line is None:
        return None
    try:
        result = json.loads(line)
    except (ValueError, RecursionError):
        result = None
    if not is_result(result):
        raise InputError(f"{name}: {DAMAGED}")
    return result


def is_report(content: bytes) -> bool:
    """Whether it is one, or the beginning of one."""
    return content[: len(TITLE)] == TITLE[: len(content)].encode()


def result_line(content: bytes) -> str | None:
    """The line of the result, as JSON; None when the report is not complete. The rest is not decoded."""
    content = content.rstrip(b"\n")
    if not content.endswith(LAST):
        return None
    end = len(content) - len(LAST)
    return content[content.rfind(b"\n", 0, end) + 1 : end].decode(errors="replace").removeprefix(RESULT)


def is_result(found: Any) -> bool:
    """Whether what was read has the numbers that a table shows: -1 for none, else from 0 to 1."""
    if not isinstance(found, dict) or [type(found.get(name)) for name in SHOWN] != KINDS:
        return False
    if not found["job"].isprintable():  # in one line of the table
        return False
    for name in METRICS:
        number = found["stats"].get(name)
        if type(number) not in (int, float) or not -1 <= number <= 1:  # NaN neither
            return False
    return True


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
        from evaluate import index  # it reads what is written here

        for line in index.summary(given.files):
            print(line)
        return
    if len(given.files) > 1:
        parser.error("-o: one chain's directory")
    from evaluate import page  # its libraries take a second

    print(page.write(given.files[0], given.output, given.reference))


if __name__ == "__main__":
    cli(main)
