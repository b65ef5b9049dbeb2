"""The checkout as a newcomer has it: the files that git tracks, and the environment that is installed already."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from utils.paths import ROOT

VENV = Path(sys.executable).parent.parent


def clone(directory: Path) -> Path:
    """A copy of what git tracks here, in `directory`, with this environment as its `.venv`."""
    here = directory / "relay"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (here / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, here / name)
    (here / ".venv").symlink_to(VENV)
    return here


def environ(**more: str) -> dict[str, str]:
    """This process's variables without those of a job, of make or of a checkout."""
    foreign = ("SLURM", "SBATCH", "RELAY", "TORCHELASTIC", "PYTHONPATH", "MAKE", "OMP_NUM_THREADS")
    return {name: value for name, value in os.environ.items() if not name.startswith(foreign)} | more


def make(here: Path, target: str) -> subprocess.CompletedProcess[str]:
    """`make TARGET` in a clone; output and errors together."""
    return subprocess.run(
        ["make", target], cwd=here, env=environ(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
