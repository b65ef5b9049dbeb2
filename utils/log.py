"""One logger: rank 0 prints, every rank writes its own file, so that no cause is lost with srun's output."""

from __future__ import annotations

import faulthandler
import logging
import sys
from pathlib import Path

logger = logging.getLogger("relay")
info = logger.info
warning = logger.warning
FORMAT = logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S")


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
        handlers.append(logging.StreamHandler(sys.stdout))
    for handler in handlers:
        handler.setFormatter(FORMAT)
        logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    faulthandler.enable(handlers[0].stream)  # type: ignore[attr-defined]
