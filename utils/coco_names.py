"""COCO's twelve numbers by name, and how one is shown. Imports nothing: programs that only name them start at once."""

from __future__ import annotations

from typing import Literal

Evaluator = Literal["auto", "hotcoco", "pycocotools"]  # auto: hotcoco where it can be imported
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


def show(value: float) -> str:
    """A COCO number for a table: three decimals, or `n/a`."""
    return "n/a" if value == -1 else f"{value:.3f}"
