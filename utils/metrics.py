"""Metrics: one JSON object a line. Console lines, reports and plots are renderings of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from utils.files import write_text


class MetricsWriter:
    """Appends records to a JSON-lines file, from which what a resumed run will write again is dropped first."""

    def __init__(self, path: Path, resumed_at_step: int) -> None:
        """Keep records up to and including `resumed_at_step`; a torn last line goes too."""
        self.path = path
        kept = [record for record in read(path) if record["step"] <= resumed_at_step] if path.exists() else []
        write_text(path, "".join(json.dumps(record) + "\n" for record in kept))

    def write(self, kind: str, *, epoch: int, step: int, **values: Any) -> None:
        """Append one record: `kind`, counters and plain values."""
        with open(self.path, "a") as file:
            file.write(json.dumps({"kind": kind, "epoch": epoch, "step": step, **values}) + "\n")


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a metrics file; a last line without its newline was torn by a kill and is left out."""
    with open(path) as file:
        for line in file:
            if line.endswith("\n"):
                yield json.loads(line)
