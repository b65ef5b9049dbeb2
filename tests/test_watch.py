"""`--watch`: the table kept up to date, whatever Slurm does, until the chain has ended."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from rich.console import Console

from jobs import known, stages, state, watch
from jobs.known import Answer
from jobs.scheduler import Job
from jobs.stages import Chain
from jobs.status import COLUMNS
from jobs.tagged import Written
from tests.test_status import begin, submit
from utils import files, paths
from utils.errors import RelayError
from utils.paths import ROOT

DONE = {"outputs": {}, "epochs": 1, "metrics": {"AP": 0.5}}


@pytest.fixture
def chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Chain:
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(paths, "RUNS", tmp_path / "runs")
    for name, value in {"REFRESH": 0.02, "ASK": 0.02, "LONGEST": 0.05}.items():
        monkeypatch.setattr(watch, name, value)
    return stages.load(ROOT / "tests/standin/chain.yaml")


@contextlib.contextmanager
def watching(chain: Chain, fails: type[Exception] | None = None) -> Iterator[threading.Thread]:
    """Watch in a thread, which ends before the block does; with an error of that type if it `fails`."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            watch.watch(chain)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    yield thread
    thread.join(30)
    assert not thread.is_alive()
    assert [type(error) for error in failed] == ([fails] if fails else [])


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


class Screen:
    """What a terminal shows, by the few sequences that draw a table in place."""

    def __init__(self, reader: int) -> None:
        self.reader, self.lines, self.row, self.column, self.raw = reader, [""], 0, 0, ""

    def read(self) -> None:
        """Read in a thread until the other side is closed."""
        with contextlib.suppress(OSError):
            while text := os.read(self.reader, 1 << 16).decode():
                self.raw += text
                for part in re.findall(r"\x1b\[\??[\d;]*[a-zA-Z]|\r|\n|[^\x1b\r\n]+", text):
                    self.draw(part)

    def draw(self, part: str) -> None:
        if part == "\r":
            self.column = 0
        elif part == "\n":
            self.row += 1
            self.lines += [""] * (self.row + 1 - len(self.lines))
        elif part == "\x1b[2K":
            self.lines[self.row] = ""
        elif up := re.fullmatch(r"\x1b\[(\d*)A", part):
            self.row -= int(up[1] or 1)
        elif not part.startswith("\x1b"):
            line = self.lines[self.row].ljust(self.column)
            self.lines[self.row] = line[: self.column] + part + line[self.column + len(part) :]
            self.column += len(part)

    def has(self, stage: str, word: str) -> bool:
        """Whether a stage's line has the word."""
        return any(line.split()[:1] == [stage] and word in line.split() for line in list(self.lines))


def test_a_terminal_shows_one_table_that_changes_in_place(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "40")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    writer = begin(chain, "pretrain")
    reader, slave = pty.openpty()
    screen = Screen(reader)
    reading = threading.Thread(target=screen.read, daemon=True)
    reading.start()
    with os.fdopen(slave, "w") as terminal:
        monkeypatch.setattr("sys.stdout", terminal)
        with watching(chain) as thread:
            until(partial(screen.has, "pretrain", "RUNNING"))
            for step in (100, 200):
                writer.write("train", epoch=0, step=step, loss=0.5, images_per_s=50.0, left_s=100.0, steps=300)
                until(partial(screen.has, "pretrain", f"{step}/300"))
            assert thread.is_alive()
            for stage in chain.stages:
                if stage != "pretrain":
                    begin(chain, stage)
                state.done(chain, stage, DONE)
        monkeypatch.undo()
    reading.join(30)
    os.close(reader)
    drawn = [line.rstrip() for line in screen.lines if line.strip()]
    assert [line.split()[:2] for line in drawn[2:7]] == [[stage, "DONE"] for stage in chain.stages]
    assert len(drawn) == 8, "title, head, five stages, the clock: nothing of an earlier table is left"
    assert max(map(len, drawn)) <= 80
    assert (screen.raw.count("\x1b[?25l"), screen.raw.count("\x1b[?25h")) == (1, 1), "the cursor is there again"
    assert "\x1b[?1049h" not in screen.raw


SQUEUE = """#!/bin/sh
while [ ! -e {0}/answers ] && [ ! -e {0}/down ]; do /bin/sleep 0.02; done
if [ -e {0}/down ]; then echo "slurm_load_jobs error: Unable to contact slurm controller" >&2; exit 1; fi
echo "7|RUNNING|None|n1|1:00|standin-pretrain|1|(null)||/"
"""


def script(tmp_path: Path, program: str, text: str) -> None:
    """Put a program on the path, whole at once: it may be run meanwhile."""
    new = tmp_path / program
    new.write_text(text)
    new.chmod(0o755)
    new.rename(tmp_path / "bin" / program)


def test_a_controller_that_does_not_answer_stops_nothing(
    chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(tmp_path, "squeue", SQUEUE.format(tmp_path))
    script(tmp_path, "sacct", "#!/bin/sh\n")
    writer = begin(chain, "pretrain")
    marker = {"slurm": True, "job_id": "7", "started": "2020-01-01T00:00:00+00:00"}
    state.update(chain, "pretrain", **marker)
    submit(chain, pretrain="7")
    output = io.StringIO()
    monkeypatch.setattr("sys.stdout", output)

    def newest() -> str:
        return output.getvalue().rpartition("chain standin")[2]

    with watching(chain):
        until(lambda: re.search(r"pretrain  RUNNING\?", newest()) is not None)
        writer.write("train", epoch=0, step=100, loss=0.5)
        until(lambda: " 100 " in newest())
        assert "Slurm has not answered yet" in newest(), "it hangs, and nobody waits for it"
        (tmp_path / "answers").touch()
        until(lambda: re.search(r"pretrain  RUNNING +7 +n1 ", newest()) is not None)
        assert newest().count("\n") == 2 + len(chain.stages) + 1
        (tmp_path / "down").touch()
        until(lambda: "Unable to contact" in newest())
        assert re.search(r"controller \(since \d\d:\d\d:\d\d; job states are of \d\d:\d\d:\d\d, next try", newest())
        writer.write("train", epoch=1, step=200, loss=0.5)
        until(lambda: re.search(r"pretrain  RUNNING +7 +n1 +1 +200 ", newest()) is not None)
        state.finish(chain, "pretrain", RelayError("no"), "")
        until(lambda: "FAILED" in newest())
        (tmp_path / "down").unlink()
        state.update(chain, "pretrain", status="done", cause=None)
        for stage in ("r1", "r2", "r3", "eval"):
            begin(chain, stage)
            state.done(chain, stage, DONE)
    assert newest().count(" DONE ") == 5


def test_a_failure_is_shown_although_the_accounting_does_not_answer(
    chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(tmp_path, "sacct", '#!/bin/sh\necho "sacct: error: no slurmdbd" >&2\nexit 1\n')
    script(tmp_path, "squeue", SQUEUE.format(tmp_path))
    (tmp_path / "answers").touch()
    begin(chain, "pretrain")
    state.update(chain, "pretrain", slurm=True, job_id="7", started="2020-01-01T00:00:00+00:00")
    submit(chain, pretrain="7")
    output = io.StringIO()
    monkeypatch.setattr("sys.stdout", output)
    with watching(chain):
        until(lambda: re.search(r"pretrain  RUNNING +7 +n1 ", output.getvalue()) is not None)
        long_ago = "2020-01-03T00:00:00+00:00"  # before the last time that squeue listed the job
        state.update(chain, "pretrain", status="failed", cause="no disk", ended=long_ago)
        script(tmp_path, "squeue", "#!/bin/sh\n")
    newest = output.getvalue().rpartition("chain standin")[2]
    assert re.search(r"pretrain  FAILED +7 .* no disk ", newest)
    assert "no slurmdbd" in newest, "it has ended all the same: squeue lists what goes on"


def test_what_slurm_did_not_tell_is_as_it_said_before_unless_the_job_has_ended() -> None:
    def answer(day: int, *jobs: str, lists: bool = False) -> Answer:
        known = {state: Job(state, state, "", "", "", "") for state in jobs}
        return Answer(f"2020-01-0{day}T00:00:00+00:00", known, lists, ["down"])

    before = answer(1, "RUNNING", "FAILED", lists=True)
    silent, listed = answer(2), answer(2, "PENDING", lists=True)
    assert known.combined(before, silent) == before._replace(is_listed=False), "nothing new"
    assert known.combined(before, listed) == listed._replace(jobs={**listed.jobs, "FAILED": before.jobs["FAILED"]})


def test_a_marker_counts_that_is_newer_than_all_that_the_accounting_has_said(chain: Chain) -> None:
    begin(chain, "pretrain")
    state.update(chain, "pretrain", slurm=True, job_id="7", started="2020-01-01T00:00:00+00:00")
    job = Job("7", "RUNNING", "", "n1", "", "standin-pretrain")
    answer = known.combined(watch.NEVER, Answer("2020-01-02T00:00:00+00:00", {"7": job}, False, ["squeue"]))
    answer = known.combined(answer, Answer("2020-01-04T00:00:00+00:00", {}, False, ["squeue", "sacct"]))
    jobs, _ = known.since(Written.read(chain), answer)
    assert jobs.known == {"pretrain": job}
    state.finish(chain, "pretrain", RelayError("no"), "")
    assert known.since(Written.read(chain), answer) == (known.Jobs({"pretrain": "7"}, {}, False), False)


def test_a_question_that_cannot_be_asked_is_told_and_asked_again(
    chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(tmp_path, "squeue", "")  # the kernel does not start an empty file
    begin(chain, "pretrain")
    output = io.StringIO()
    monkeypatch.setattr("sys.stdout", output)
    with watching(chain):
        until(lambda: "Exec format error" in output.getvalue())
        script(tmp_path, "squeue", "#!/bin/sh\n")
        until(lambda: "Exec format error" not in output.getvalue().rpartition("chain standin")[2])
        state.finish(chain, "pretrain", RelayError("no"), "")


def test_an_error_that_nobody_expects_ends_it(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(chains: object) -> Answer:
        raise KeyError("no such column")

    monkeypatch.setattr(known, "ask", ask)
    monkeypatch.setattr("sys.stdout", io.StringIO())
    with watching(chain, fails=KeyError):
        pass


def test_it_asks_less_and_less_often_until_there_is_an_answer(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"ASK": 30.0, "LONGEST": 300.0}.items():
        monkeypatch.setattr(watch, name, value)
    problems = [["squeue"]] * 5 + [[], ["squeue"], ["sacct"], []]
    at = iter(f"2026-01-01T00:00:0{number}+00:00" for number in range(9))
    monkeypatch.setattr(known, "ask", lambda _: Answer(next(at), {}, "squeue" not in problems[0], problems.pop(0)))
    questions = watch.Questions(chain, Written.read(chain))
    pauses: list[float] = []
    answered: list[str] = []

    class Over(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            assert timeout
            pauses.append(timeout)
            answered.append(questions.said.answer.at[17:19])
            if not problems:
                self.set()
            return self.is_set()

    questions.over = Over()
    questions._ask()
    assert pauses == [60, 120, 240, 300, 300, 30, 60, 120, 30]
    assert answered == ["", "", "", "", "", "05", "05", "07", "08"], "states are as old as squeue's last answer"


def test_what_the_files_say_since_the_answer_counts(chain: Chain) -> None:
    job = Job("7", "PENDING", "Priority", "", "", "standin-pretrain")
    answer = Answer("2026-01-01T00:00:00+00:00", {"7": job}, True, [])

    def said() -> tuple[str, bool]:
        jobs, is_current = known.since(Written.read(chain), answer)
        return (jobs.known["pretrain"].state if "pretrain" in jobs.known else "", is_current)

    entry = {"token": "", "submitted": "2025-01-01T00:00:00+00:00", "log": "", "config": {}, "job_id": "7"}
    files.write_json(chain.dir.jobs, {"pretrain": entry})
    assert said() == ("PENDING", True)
    begin(chain, "pretrain")
    state.update(chain, "pretrain", slurm=True, job_id="7")
    assert said() == ("RUNNING", False), "it began after the answer"
    state.update(chain, "pretrain", started="2025-12-31T00:00:00+00:00")
    assert said() == ("PENDING", True), "requeued, as far as is known"
    state.finish(chain, "pretrain", RelayError("no"), "")
    assert said() == ("", False), "it failed after the answer"
    files.write_json(chain.dir.jobs, {"pretrain": {**entry, "submitted": state.now(), "job_id": "8"}})
    assert said() == ("PENDING", False), "a job that Slurm has not been asked for"


@pytest.mark.parametrize(
    ("words", "over"),
    [
        ("DONE,DONE", True),
        ("DONE,TODO", False),  # the launcher may not have begun it yet
        ("TODO,TODO", False),
        ("DONE,FAILED,TODO", True),
        ("FAILED (gone),CANCELLED", True),
        ("FAILED,PENDING (Dependency)", False),
        ("CANCELLED,RUNNING", False),
        ("PREEMPTED,TODO", True),
        ("DONE,REQUEUED (BeginTime)", False),
        ("FAILED,QUEUED?", False),
    ],
)
def test_when_it_ends(words: str, over: bool) -> None:
    assert watch.has_ended(words.split(",")) is over


def test_it_ends_with_a_failed_chain_but_not_before_its_launcher(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(chain, "pretrain")
    state.finish(chain, "pretrain", RelayError("no disk"), "")
    chain.dir.lock.write_text(f"process {os.getpid()} on {socket.gethostname()}, cluster tpu\n")
    output = io.StringIO()
    monkeypatch.setattr("sys.stdout", output)
    looks: list[bool] = []
    asked = watch.is_launched

    def is_launched(chain: Chain) -> bool:
        looks.append(asked(chain))
        return looks[-1]

    monkeypatch.setattr(watch, "is_launched", is_launched)
    with watching(chain) as thread:
        until(lambda: len(looks) > 3)
        assert thread.is_alive()
        chain.dir.lock.write_text(f"process 999999999 on {socket.gethostname()}, cluster tpu\n")
    assert (output.getvalue().count("FAILED"), "no disk" in output.getvalue()) == (1, True), "printed once"


def test_files_that_cannot_be_read_for_a_moment(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(chain, "pretrain")
    file = chain.run_dir("pretrain").metrics
    output = io.StringIO()
    monkeypatch.setattr("sys.stdout", output)

    def newest() -> str:
        return output.getvalue().rpartition("chain standin")[2]

    with watching(chain):
        until(lambda: "RUNNING" in output.getvalue())
        file.mkdir()
        until(lambda: "Is a directory" in output.getvalue())
        chain.dir.lock.mkdir()
        file.rmdir()
        state.finish(chain, "pretrain", RelayError("no"), "")
        until(lambda: re.search("FAILED.*Is a directory", newest(), re.DOTALL) is not None)
        chain.dir.lock.rmdir()
    assert "Is a directory" not in newest()


def test_a_log_gets_the_table_again_when_something_has_happened(
    chain: Chain, capsys: pytest.CaptureFixture[str]
) -> None:
    def row(**cells: str) -> list[list[str]]:
        return [list((dict.fromkeys(COLUMNS, "x") | cells).values())]

    with watch._lines(chain) as show:
        for cells in ({}, {"elapsed": "0:02"}, {"left": "0:30"}, {"step": "2"}, {"images/s": "9.5"}, {"loss": "0.5"}):
            show(row(**cells), [])
        assert capsys.readouterr().out.count("chain standin") == 1
        for name in ("state", "cause", "job", "restarts", "AP", "epoch"):
            show(row(**{name: "y"}), [])
            show(row(), [])
            assert capsys.readouterr().out.count("chain standin") == 2, name
        for note in ("down (since 10:00:00; next try in 60 s)", "down (since 10:00:00; next try in 120 s)"):
            show(row(), [note])
        assert capsys.readouterr().out.count("down") == 1
        for notes in (["full disk"], []):
            show(row(), notes)
            assert capsys.readouterr().out.count("chain standin") == 1


ROW = {
    "stage": "pretrain", "state": "PENDING (Dependency)", "job": "1234567", "node": "node[001-128]", "epoch": "199",
    "step": "123456/1234567", "images/s": "12345.6", "loss": "10.2345", "AP": "0.1234", "left": "100:00:00",
    "elapsed": "1 day, 10:00:00", "restarts": "12", "cause": "RuntimeError: [red]x[/red] [link=http://x]" + 40 * " y",
    "log": "runs/mocov2_fpn/pretrain/logs/1234567_12_rank0.log",
}  # fmt: skip


@pytest.mark.parametrize("width", [60, 80, 100, 250])
def test_a_narrow_terminal_keeps_stage_state_and_progress_whole(chain: Chain, width: int) -> None:
    assert tuple(ROW) == COLUMNS
    console = Console(width=width, file=io.StringIO(), force_terminal=True, color_system=None)
    console.print(watch.drawn(chain, [list(ROW.values())], ["down [bold]!"], width))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    words = text.split()
    assert {"pretrain", "PENDING", "(Dependency)", "199", "123456/1234567", ROW["log"]} <= set(words)
    assert "…" not in "".join(lines[1:]) and "..." not in text
    assert "[red]x[/red] [link=http://x]" in " ".join(words), "data, no markup"
    assert "down [bold]!" in text
    head = set(lines[1].split())
    missing = {60: {"AP", "loss", "job", "node"}, 80: {"job", "node", "elapsed"}, 100: {"node"}, 250: set()}
    assert head.isdisjoint(missing[width])
    assert {60: {"step"}, 80: {"left", "AP", "loss"}, 100: {"images/s"}, 250: set(COLUMNS[:-2])}[width] <= head
