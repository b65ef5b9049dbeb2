"""A copy of the checkout for one test: stand-in stages, an empty runs/, and what a user types in it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.cluster import Cluster
from utils.paths import ROOT

STAGES = ["pretrain", "r1", "r2", "r3", "eval"]


class Process(subprocess.Popen[str]):
    """A process that does not outlive the test when an assertion in its block fails."""

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        if kind:
            self.kill()
        super().__exit__(kind, *rest)


class Checkout:
    patience = 120.0  # seconds for one program

    def __init__(self, directory: Path, cluster: Cluster | None = None) -> None:
        self.root = directory / "checkout"
        for name in ("jobs", "slurm", "utils", "tests/standin"):
            shutil.copytree(ROOT / name, self.root / name, ignore=shutil.ignore_patterns("__pycache__"))
        (self.root / "tests/__init__.py").touch()
        (self.root / "runs").mkdir()
        foreign = ("SLURM", "SBATCH", "RELAY", "TORCHELASTIC", "PYTHONPATH")
        self.environ = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        self.environ |= {"OMP_NUM_THREADS": "1", "RELAY_PYTHON": sys.executable}
        self.environ |= cluster.env if cluster else {}

    def run(self, *argv: object, **environ: str) -> subprocess.CompletedProcess[str]:
        """Run a program from the checkout's root; output and errors together."""
        with self.start(*argv, **environ) as process:
            output, _ = process.communicate(timeout=self.patience)
        return subprocess.CompletedProcess(process.args, process.returncode, output)

    def start(self, *argv: object, **environ: str) -> Process:
        return Process(
            [str(word) for word in argv],
            cwd=self.root,
            env=self.environ | environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def launch(self, *words: object) -> subprocess.CompletedProcess[str]:
        return self.run(sys.executable, "jobs/launch.py", "--file", "tests/standin/chain.yaml", *words)

    def local(self, *words: object) -> subprocess.CompletedProcess[str]:
        return self.launch("--cluster", "local", *words)

    def worker(self, stage: str, *words: object) -> subprocess.CompletedProcess[str]:
        return self.run(*self.worker_command(stage, *words))

    def worker_command(self, stage: str, *words: object) -> list[object]:
        return [sys.executable, "-m", "jobs.worker", stage, "--file", "tests/standin/chain.yaml", *words]

    def state(self, stage: str, chain: str = "standin") -> dict[str, Any]:
        return json.loads((self.root / "runs" / chain / stage / "state.json").read_text())

    def made(self, stage: str, chain: str = "standin") -> str:
        """What a stand-in stage was made from, in order."""
        return (self.root / "runs" / chain / stage / "last.txt").read_text()

    def table(self, *words: str) -> dict[str, str]:
        """Stage -> its line of `--status`."""
        output = self.launch("--status", *words).stdout
        return {line.split()[0]: line for line in output.splitlines() if line.split()[:1] != []}

    def files(self) -> set[str]:
        """Every file below runs/."""
        return {str(path.relative_to(self.root)) for path in (self.root / "runs").rglob("*")}
