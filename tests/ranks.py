"""Real ranks for tests: the same small program in several processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence

from utils.paths import ROOT

# By this flag XLA compiles for the CPU in a twentieth of the time, to code of the same arithmetic.
XLA = {"PJRT_DEVICE": "CPU", "XLA_FLAGS": "--xla_backend_optimization_level=0"}


def torchrun(
    ranks: int, *command: object, environ: Mapping[str, str] | None = None, timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    """Run `command` (`-m module …` or `script …`) as `ranks` processes on one node; output is captured."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return run([*launcher, *map(str, command)], environ, timeout=timeout)


def run(
    argv: Sequence[object], environ: Mapping[str, str] | None = None, timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    """Run one program from the checkout with one thread; output is captured, the exit code is not checked."""
    return subprocess.run(
        [str(word) for word in argv],
        cwd=ROOT,
        env=environment(environ or {}),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def environment(own: Mapping[str, str]) -> dict[str, str]:
    """This process's environment without what launchers left in it, for one thread a process."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "TORCHELASTIC"))}
    return {**inherited, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **own}
