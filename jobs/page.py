"""The page about a chain, made when its last stage is done, wherever that ran."""

from __future__ import annotations

import subprocess
import sys

from jobs import state
from jobs.stages import Chain
from utils.paths import ROOT

PROGRAM = "evaluate.report"  # by name: its libraries are not for a login node's launcher


def make(chain: Chain) -> str:
    """Write the page of a chain that is done; a line that says where it is, or why it is not, empty before that.

    Never an error: what the stages have made is there, and the page can be made again.
    """
    if any(state.read(chain, stage)["status"] != "done" for stage in chain.stages):
        return ""
    command = [sys.executable, "-m", PROGRAM, str(chain.dir.path), "-o", str(chain.dir.page)]
    ended = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if ended.returncode:
        why = (ended.stderr.strip() or f"exit code {ended.returncode}").splitlines()[-1]
        return f"chain page: not written: {why}"
    return f"chain page: {chain.dir.page}"
