"""Exit codes, and causes short enough for a table."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset

from utils import errors, loader, log


class Broken(Dataset[int]):
    """Raises in a loader worker, as a damaged image does."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> int:
        raise errors.InputError("images/7.JPEG: unreadable image: truncated")


class Signalled(Dataset[bool]):
    """Survives the warning signal that Slurm sends to all processes of a job."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> bool:
        for warning in (signal.SIGUSR1, signal.SIGUSR2):
            os.kill(os.getpid(), warning)
        return True


def batches(dataset: Dataset[object]) -> list[object]:
    made = loader.make(dataset, loader.WholeBatches(2, 1), workers=1, device=torch.device("cpu"), collate=list)
    return list(made)


def test_a_loader_worker_s_error_keeps_its_type_and_only_its_text() -> None:
    with pytest.raises(errors.InputError) as caught:
        batches(Broken())
    assert errors.exit_code(caught.value) == 2
    assert errors.one_line(caught.value) == "images/7.JPEG: unreadable image: truncated"


def test_warning_signals_do_not_touch_loader_workers() -> None:
    assert batches(Signalled()) == [[True], [True]]


def test_the_machine_s_failures_are_told_from_the_user_s() -> None:
    assert errors.exit_code(OSError(errno.ENOSPC, "No space left on device")) == 75
    assert errors.exit_code(OSError(errno.ENOENT, "No such file")) == 1
    assert errors.exit_code(errors.DivergedError("nan")) == 4


def test_a_long_cause_is_cut() -> None:
    assert len(errors.one_line(RuntimeError("word " * 1000))) < 400


def test_a_second_run_in_one_process_logs_to_its_own_file(tmp_path: Path) -> None:
    for name in ("a", "b"):
        log.setup(0, tmp_path / name / "log")
        log.info(f"of {name}")
    assert [(tmp_path / name / "log").read_text().split()[1:] for name in ("a", "b")] == [["of", "a"], ["of", "b"]]
