"""The page about a chain, made when its last stage is done, wherever that ran."""

from __future__ import annotations

import subprocess
import sys

from jobs import state
from jobs.stages import Chain
from utils.errors import RelayError, one_line
from utils.paths import ROOT

PROGRAM = "evaluate.report"  # by name: its libraries are not for a login node's launcher
TIMEOUT = 600  # seconds; it takes some, and no job may be kept for more by a file system that hangs


def make(chain: Chain) -> str:
    """Write the page of a chain that is done; a line that says where it is, or why it is not, empty before that.

    Never an error: what the stages have made is there, and the page can be made again.
    """
    try:
        if any(state.read(chain, stage)["status"] != "done" for stage in chain.stages):
            return ""
        return _made(chain)
    except subprocess.TimeoutExpired:
        why = f"not ready after {TIMEOUT} s"
    except (RelayError, OSError) as error:
        why = one_line(error)
    return f"chain page: not written: {why}"


def _made(chain: Chain) -> str:
    command = [sys.executable, "-m", PROGRAM, str(chain.dir.path), "-o", str(chain.dir.page)]
    silent, kept = subprocess.DEVNULL, subprocess.PIPE
    ended = subprocess.run(command, cwd=ROOT, stdout=silent, stderr=kept, text=True, errors="replace", timeout=TIMEOUT)
    if ended.returncode:
        raise RelayError((ended.stderr.strip() or f"exit code {ended.returncode}").splitlines()[-1])
    return f"chain page: {chain.dir.page}"
