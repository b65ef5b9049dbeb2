"""A loss that is not finite ends all ranks with exit code 4 and the names of its images; good checkpoints stay."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.labeled_set import write_set
from tests.test_detect_train import SMALL as SMALL_DETECTOR
from tests.test_security import free_port, torchrun_like
from tests.test_ssl_train import SMALL as SMALL_PRETRAINING
from tests.test_ssl_train import write_images
from utils import checkpoint, checkpoint_files
from utils.files import sha256
from utils.paths import ROOT, RunDir

PROGRAMS: dict[str, tuple[list[str], Callable[[Path], Path]]] = {
    "ssl_train.train": (SMALL_PRETRAINING, write_images),
    "detect_train.train": (SMALL_DETECTOR, write_set),
}


def two_ranks(command: list[str]) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of each rank."""
    port = free_port()
    inherited = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=ROOT,
            env=inherited | torchrun_like(rank, port),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        answers = [rank.communicate(timeout=120) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return [(rank.returncode, *answer) for rank, answer in zip(ranks, answers, strict=True)]


@pytest.mark.parametrize("program", PROGRAMS)
def test_both_ranks_end_with_4_and_the_good_checkpoint_stays(program: str, tmp_path: Path) -> None:
    small, write = PROGRAMS[program]
    data, run_dir = write(tmp_path / "data"), RunDir(tmp_path / "run")
    command = [program, "--run-dir", str(run_dir.path), "--dataset-root", str(data), *small, "log_every=1"]
    for code, output, errors in two_ranks([*command, "--epochs", "1"]):
        assert code == 0, output + errors
    (good,) = checkpoint_files.everything(run_dir.checkpoints)
    step, digest = checkpoint.read(good)["step"], sha256(good)
    ends = two_ranks([*command, "--epochs", "3", "--lr", "1e30"])
    images = {str(path) for path in data.rglob("*.*") if path.suffix in (".png", ".JPEG")}
    for code, output, errors in ends:
        assert code == 4, output + errors
        (line,) = (line for line in errors.splitlines() if line.startswith("ERROR 4: "))
        found = re.search(r"loss is not finite at step (\d+) \(epoch 1\): .*lower optim\.lr\. Its images: (.*)", line)
        assert found and step + 1 <= int(found[1]) <= step + 3, line
        named = found[2].split(", ")
        assert len(named) == 4 and set(named) <= images
    assert ends[0][2].splitlines()[-1] == ends[1][2].splitlines()[-1]
    assert checkpoint_files.everything(run_dir.checkpoints) == [good]
    assert sha256(good) == digest
