"""Metrics and settings as CSV, for spreadsheets: renderings of metrics.jsonl and config.yaml."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from utils import config, metrics
from utils.files import write_text
from utils.paths import RunDir

LAST = ("lr", "images_per_s", "data_wait", "seconds")  # of an epoch's numbers, after its averages


def write_log(run_dir: RunDir) -> None:
    """Write train_log.csv anew: a line an epoch, with the numbers of its validation if there was one."""
    epochs: dict[int, dict[str, Any]] = {}
    trained: dict[str, None] = {}  # names in the order in which they come
    measured: dict[str, None] = {}
    for record in metrics.read(run_dir.metrics):
        if record["kind"] in ("epoch", "val"):
            numbers = metrics.numbers(record)
            (trained if record["kind"] == "epoch" else measured).update(dict.fromkeys(numbers))
            row = epochs.setdefault(record["epoch"], {"epoch": record["epoch"]})
            row |= {"step": record["step"], **numbers}
    columns = ["epoch", "step", *(name for name in trained if name not in LAST), *LAST, *measured]
    _write(run_dir.train_log, columns, ([row.get(name) for name in columns] for row in epochs.values()))


def write_settings(run_dir: RunDir, cfg: Any) -> None:
    """Write hyperparam.csv: every key of a configuration, lists and null as JSON."""
    rows = config.dotted(config.to_dict(cfg))
    written = ((key, value if isinstance(value, str) else json.dumps(value)) for key, value in rows)
    _write(run_dir.hyperparam, ["key", "value"], written)


def _write(path: Path, columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    text = io.StringIO(newline="")
    table = csv.writer(text, lineterminator="\n")
    table.writerow(columns)
    table.writerows(rows)
    write_text(path, text.getvalue())
