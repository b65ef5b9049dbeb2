"""Which code this is."""

from __future__ import annotations

import os
import subprocess

from utils.paths import ROOT

PATIENCE = 10.0  # seconds: a hanging file system must not hold up a run for a line of its report


def commit() -> str | None:
    """The commit of the checkout, with "-dirty" when tracked files differ from it; None where git does not know."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    environ = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    try:
        found = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=PATIENCE)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() if found.returncode == 0 else None
