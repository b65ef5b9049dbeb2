"""Progress: plain lines in a log, a bar on a terminal."""

from __future__ import annotations

import os
import pty
import re

import pytest

from utils import progress
from utils.progress import Progress


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


def test_a_terminal_gets_one_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = pty.openpty()
    monkeypatch.setattr(progress, "BAR_SECONDS", 0.0)
    with os.fdopen(writer, "w") as terminal:
        monkeypatch.setattr("sys.stderr", terminal)
        with Progress("read", total=2, unit="images") as bar:
            bar.update(1)
            bar.update(1)
        text = ""
        while "\n" not in text:
            text += os.read(reader, 10_000).decode()
    os.close(reader)
    assert text.count("\n") == 1 and text.count("\r\033[K") == 3
    assert f"[{'#' * 15}{'.' * 15}]" in text and f"[{'#' * 30}] 100% 2/2 images" in text


def test_nothing_to_do_is_done(capfd: pytest.CaptureFixture[str]) -> None:
    Progress("unpack", total=0, unit="B").close()
    assert capfd.readouterr().err.startswith("unpack: 100% 0.0/0.0 MiB ")
