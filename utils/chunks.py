"""Work on many images at once, by the processes of a loader, that tells how far it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import Dataset

from utils import loader, stop
from utils.errors import Stopped
from utils.progress import Progress

CHUNK = 64  # images that a process works on before it tells how far it is


class _Work(Dataset[Any]):
    def __init__(self, work: Callable[[range], Any]) -> None:
        self.work = work

    def __getitems__(self, chunk: range) -> Any:
        return self.work(chunk)


def in_chunks(work: Callable[[range], Any], length: int, what: str, workers: int) -> list[Any]:
    """What `work` returns for all images, in order. Raises: Stopped when a signal asks for the end."""
    chunks: Any = [range(start, min(start + CHUNK, length)) for start in range(0, length, CHUNK)]
    how: dict[str, Any] = {"workers": workers, "device": torch.device("cpu"), "collate": loader.whole}
    done: list[Any] = []
    with Progress(what, total=length, unit="images") as progress:
        for part in loader.start(loader.make(_Work(work), chunks, **how)):
            done += part
            progress.update(len(part))
            if stop.requested():
                raise Stopped(f"stopped by {stop.told()} while a cache was made; the same again makes it anew")
    return done
