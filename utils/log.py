"""One logger: rank 0 prints, every rank writes its own file, so that no cause is lost with srun's output."""

from __future__ import annotations

import faulthandler
import logging
import sys
from pathlib import Path
from typing import TextIO

logger = logging.getLogger("relay")
detail = logger.debug  # to the rank's own file only
info = logger.info
warning = logger.warning
FORMAT = logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S")


class _Console(logging.StreamHandler[TextIO]):
    """Prints to what standard output is by then: a progress bar replaces it, to print above itself."""

    def __init__(self) -> None:
        logging.Handler.__init__(self, logging.INFO)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stdout


def setup(rank: int, file: Path) -> None:
    """Send this rank's messages to `file`, no longer to an earlier one, and on rank 0 to standard output.

    Crashes inside C code leave their Python stack in `file` too.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    for old in list(logger.handlers):
        logger.removeHandler(old)
        old.close()
    handlers: list[logging.Handler] = [logging.FileHandler(file)]
    if rank == 0:
        handlers.append(_Console())
    for handler in handlers:
        handler.setFormatter(FORMAT)
        logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    faulthandler.enable(handlers[0].stream)  # type: ignore[attr-defined]
