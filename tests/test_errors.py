"""Exit codes, and causes short enough for a table."""

from __future__ import annotations

import errno
import os
import re
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


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.InputError("no such file"), 2), (errors.CheckpointError("all are damaged"), 3),
        (errors.DivergedError("loss is nan"), 4), (errors.EnvironmentProblem("no disk"), 75), (KeyError("x"), 1),
    ],
)  # fmt: skip
def test_a_program_ends_with_the_code_and_one_line(
    error: Exception, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def program() -> None:
        raise error

    with pytest.raises(SystemExit) as ended:
        errors.cli(program)
    assert ended.value.code == code
    *before, last = capsys.readouterr().err.splitlines()
    assert last == f"ERROR {code}: {error}"
    assert (before[:1] == ["Traceback (most recent call last):"]) == (code == 1)


def test_a_stopped_program_ends_well(capsys: pytest.CaptureFixture[str]) -> None:
    def program() -> None:
        raise errors.Stopped("stopped by SIGTERM after step 7")

    errors.cli(program)  # no SystemExit: exit code 0
    assert capsys.readouterr() == ("stopped by SIGTERM after step 7\n", "")


def test_a_long_cause_is_cut() -> None:
    assert len(errors.one_line(RuntimeError("word " * 1000))) < 400


def test_a_second_run_in_one_process_logs_to_its_own_file(tmp_path: Path) -> None:
    for name in ("a", "b"):
        log.setup(0, tmp_path / name / "log")
        log.info(f"of {name}")
    assert [(tmp_path / name / "log").read_text().split()[1:] for name in ("a", "b")] == [["of", "a"], ["of", "b"]]


class Killed(Dataset[int]):
    """Ends its loader process, as the kernel does for want of memory."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> int:
        os.kill(os.getpid(), signal.SIGKILL)
        return 0


def test_a_killed_loader_process_is_named_whoever_notices_it() -> None:
    with pytest.raises(RuntimeError) as noticed:
        batches(Killed())
    named = r"loader process \d+ was killed \(Killed\), perhaps for memory"
    assert re.match(named, str(errors.explained(noticed.value)))
    late = RuntimeError("DataLoader worker (pid(s) 12, 13) exited unexpectedly")
    assert str(errors.explained(late)).startswith("loader process 12, 13 ended, perhaps killed for memory")
    late.__cause__ = RuntimeError("DataLoader worker (pid 12) is killed by signal: Killed. ")
    assert re.match(named, str(errors.explained(late)))
    closed = errors.explained(RuntimeError("Application timeout caused pair closure"))  # gloo, not always by name
    assert str(closed).startswith("lost another rank")
    assert errors.explained(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
