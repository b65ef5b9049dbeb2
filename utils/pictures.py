"""Small pictures beside and below each other."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

GAP = 2  # pixels between two pictures


def grid(pictures: Sequence[Image.Image], columns: int) -> Image.Image:
    """`pictures` row by row, each in a cell as large as the largest."""
    width = GAP + max(picture.width for picture in pictures)
    height = GAP + max(picture.height for picture in pictures)
    rows = -(-len(pictures) // columns)
    whole = Image.new("RGB", (columns * width - GAP, rows * height - GAP), "white")
    for place, picture in enumerate(pictures):
        whole.paste(picture, (place % columns * width, place // columns * height))
    return whole
