"""Progress: plain lines in a log, a bar on a terminal that leaves what is printed whole."""

from __future__ import annotations

import os
import pty
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from utils import log, progress
from utils.progress import Progress, Training

RATES = {"images_per_s": 123.45, "data_wait": 0.126, "left_s": 3725.4}


def test_a_log_gets_few_plain_lines(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LOG_SECONDS", 3600.0)
    with Progress("read", total=4, unit="images") as quick:
        for _ in range(4):
            quick.update(1)
    assert re.fullmatch(r"read: 100% 4/4 images \d+ s\n", capfd.readouterr().err)
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.0)
    with Progress("copy", total=4 << 20, unit="B") as slow:
        slow.update(1 << 20)
        slow.update(2 << 20)
    amounts = [line.rpartition("MiB")[0] for line in capfd.readouterr().err.splitlines()]
    assert amounts == ["copy: 25% 1.0/4.0 ", "copy: 75% 3.0/4.0 ", "copy: 75% 3.0/4.0 "]


def test_nothing_to_do_is_done(capfd: pytest.CaptureFixture[str]) -> None:
    Progress("unpack", total=0, unit="B").close()
    assert capfd.readouterr().err.startswith("unpack: 100% 0.0/0.0 MiB ")


@pytest.fixture
def on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], tuple[str, list[str]]]:
    """What is sent to a terminal of 100 columns, as standard output and error, and the lines it shows in the end."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(progress, "BAR_SECONDS", 0.0)

    def seen(write: Callable[[], object]) -> tuple[str, list[str]]:
        reader, writer = pty.openpty()
        with os.fdopen(writer, "w") as terminal, monkeypatch.context() as patch:
            patch.setattr("sys.stdout", terminal)
            patch.setattr("sys.stderr", terminal)
            write()
            print("END", file=terminal, flush=True)
            sent = b""
            while b"END" not in sent:
                sent += os.read(reader, 10_000)
        os.close(reader)
        return sent.decode(), shown(sent.decode().partition("END")[0])

    return seen


def shown(sent: str) -> list[str]:
    """The lines of a terminal; it understands as much as a bar of one line needs."""
    lines = [""]
    for part in re.findall(r"\x1b\[[?\d;]*[a-zA-Z]|\r|\n|[^\x1b\r\n]+", sent):
        if part == "\n":
            lines.append("")
        elif part == "\x1b[2K":
            lines[-1] = ""
        elif part[0] not in "\x1b\r":
            lines[-1] += part
        else:
            assert part in ("\r", "\x1b[?25l", "\x1b[?25h") or part.endswith("m"), repr(part)
    return [line.rstrip() for line in lines if line]


def test_a_terminal_gets_one_bar(on_a_terminal: Any) -> None:
    def work() -> None:
        with Progress("read [b]", total=2, unit="images") as bar:
            bar.update(1)
            bar.update(1)

    sent, lines = on_a_terminal(work)
    assert len(lines) == 1 and re.fullmatch(r"read \[b\] ━+ 100% 2/2 images \d s", lines[0])
    assert " 50% 1/2 images" in sent and sent.endswith("\x1b[?25hEND\r\n")


def test_what_is_printed_during_training_stands_above_the_bar(on_a_terminal: Any, tmp_path: Path) -> None:
    log.setup(0, tmp_path / "log")  # before the bar

    def work() -> None:
        with Training("r1", 3, 12, is_shown=True) as training:
            for step in range(1, 7):
                training.step(0, step)
                if step % 2 == 0:
                    training.numbers(0, step, {"loss": 0.5, "loss_box": 0.2}, 0.03, RATES, is_last=step == 4)
            log.info("checkpoint_0000.pth saved")
            print("Epoch Stats [0]")
            print("an old thing", file=sys.stderr)

    _, lines = on_a_terminal(work)
    last, saved, stats, warned, bar = lines
    wide = "epoch 0  step 4/12  loss 0.5000  loss_box 0.2000  lr 0.03  123.5 images/s  data wait 13%  1:02:05 left"
    assert last.endswith(wide) and len(last) > 100, "a line is not broken"
    assert (saved[9:], stats, warned) == ("checkpoint_0000.pth saved", "Epoch Stats [0]", "an old thing")
    where = "r1  epoch 1/3  step 6/12  1:02:05 left  loss 0.5000  123.5 images/s  data wait 13%"
    assert re.fullmatch(rf"{re.escape(where)} [━╸╺]+", bar) and len(bar) <= 100


def test_on_a_narrow_terminal_the_end_of_the_bar_is_cut(on_a_terminal: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")

    def work() -> None:
        with Training("r1", 3, 12, is_shown=True) as training:
            training.numbers(0, 6, {"loss": 0.5}, 0.03, RATES, is_last=False)

    _, lines = on_a_terminal(work)
    assert [line.rstrip(" ━╸╺") for line in lines] == ["r1  epoch 1/3  step 6/12  1:02:05 left  loss 0.5000  123.5…"]


def test_an_error_leaves_the_terminal_as_it_was(on_a_terminal: Any) -> None:
    def work() -> None:
        with pytest.raises(KeyboardInterrupt), Training("r1", 3, 12, is_shown=True) as training:
            training.step(0, 1)
            raise KeyboardInterrupt
        print("afterwards")

    sent, lines = on_a_terminal(work)
    assert lines[-1] == "afterwards" and "step 1/12" in lines[-2]
    assert sent.endswith("\x1b[?25hafterwards\r\nEND\r\n"), "the cursor is shown again"


def test_no_other_rank_draws_a_bar(on_a_terminal: Any) -> None:
    def work() -> None:
        with Training("r1", 3, 12, is_shown=False) as training:
            training.step(0, 1)
            training.numbers(0, 1, {"loss": 0.5}, 0.03, RATES, is_last=False)

    assert on_a_terminal(work) == ("END\r\n", [])


def test_a_batch_log_gets_a_line_now_and_then_and_the_rank_s_file_each(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    log.setup(0, tmp_path / "log")
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with Training("r1", 1, 20, is_shown=True) as training:
        for step in range(1, 21):
            now += 3
            training.step(0, step)
            training.numbers(0, step, {"loss": 0.5}, 0.03, RATES, is_last=step == 19)

    def steps(text: str) -> list[int]:
        return [int(step) for step in re.findall(r" step (\d+)/20  loss 0.5000 ", text)]

    assert steps(capsys.readouterr().out) == [1, 5, 9, 13, 17, 19], "every 12 s, and the epoch's last"
    assert steps((tmp_path / "log").read_text()) == list(range(1, 21))


def test_before_the_first_step_of_a_process_no_time_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log.setup(0, tmp_path / "log")
    with Training("r1", 1, 20, is_shown=True) as training:
        training.numbers(0, 3, {"loss": 0.5}, 0.03, RATES | {"left_s": None}, is_last=True)
    assert capsys.readouterr().out.endswith("  lr 0.03  123.5 images/s  data wait 13%  ? left\n")
