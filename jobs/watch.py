"""`--watch`: the table of a chain, kept up to date until the chain has ended.

The chain's files are read every two seconds. Slurm is asked by a thread, twice a minute, and less often while it does
not answer; meanwhile its last answer stands, but for what the files have said since.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import re
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from jobs import known, state, status
from jobs.known import Answer
from jobs.stages import Chain
from jobs.status import COLUMNS
from jobs.tagged import Written
from utils.errors import one_line
from utils.slurm import FINAL

if TYPE_CHECKING:
    from rich.console import Group

REFRESH, ASK, LONGEST = 2.0, 30.0, 300.0  # seconds: from one look at the files, or question, to the next; at most
BELOW = ("cause", "log")  # on lines of their own
NEWS = ("state", "cause", "job", "restarts", "AP", "epoch")  # what is worth another table in a log
OPTIONAL = ("node", "restarts", "job", "elapsed", "images/s", "loss", "AP", "left")  # left out first where it is narrow
GAP = 2  # spaces between two columns
NEVER = Answer("9999", {}, False, ["Slurm has not answered yet"])
STYLES = {"DONE": "green", "RUNNING": "cyan", "PENDING": "yellow", "REQUEUED": "yellow"}
Show = Callable[[Sequence[Sequence[str]], Sequence[str]], None]


def watch(chain: Chain) -> None:
    """Show the chain until all its stages are done, or one has failed and nothing goes on.

    Raises: InputError when one of its files is damaged; what ended the thread that asks.
    """
    written = Written.read(chain)
    rows: list[list[str]] = []
    with Questions(chain, written) as questions, _terminal(chain) if _is_terminal() else _lines(chain) as show:
        while True:
            questions.news.wait(REFRESH)
            questions.news.clear()
            if questions.failed:
                raise questions.failed
            answer, notes = questions.said
            is_over = False
            try:
                questions.written = written = Written.read(chain)
                jobs, is_current = known.since(written, answer)
                rows = status.rows(written, jobs)
                is_over = is_current and not is_launched(chain) and has_ended([row[1] for row in rows])
            except OSError as error:  # of a network file system, it may be
                notes = [*notes, one_line(error)]
            show(rows, [status.harmless(note) for note in notes])
            if is_over:
                return


class Said(NamedTuple):
    """What is known from elsewhere than the chain's files."""

    answer: Answer
    notes: Sequence[str]


class Questions:
    """Asks Slurm, and the chain's store, in a thread: nobody waits for a controller that does not answer."""

    def __init__(self, chain: Chain, written: Written) -> None:
        self.chain, self.written = chain, written
        self.said = Said(NEVER, NEVER.problems)
        self.failed: BaseException | None = None
        self.news, self.over = threading.Event(), threading.Event()

    def __enter__(self) -> Questions:
        threading.Thread(target=self._run, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()

    def _run(self) -> None:
        try:
            self._ask()
        except BaseException as error:  # in a thread, from where it would be lost
            self.failed = error
            self.news.set()

    def _ask(self) -> None:
        answer, pause, silent = self.said.answer, ASK, ""
        while not self.over.is_set():
            notes = status.refreshed(self.chain)
            try:
                new = known.ask([self.written])
            except OSError as error:  # no process can be started just now, it may be
                new = Answer(state.now(), {}, False, [one_line(error)])
            if new.problems:
                silent = silent or new.at
                pause = min(2 * pause, LONGEST)
                answer = known.combined(answer, new)
                of = "" if answer.at == NEVER.at else f"job states are of {_local(answer.at)}, "
                notes += [f"{text} (since {_local(silent)}; {of}next try in {pause:.0f} s)" for text in new.problems]
            else:
                answer, pause, silent = new, ASK, ""
            self.said = Said(answer, notes)
            self.news.set()
            self.over.wait(pause)


def _local(at: str) -> str:
    return datetime.datetime.fromisoformat(at).astimezone().strftime("%H:%M:%S")


def has_ended(states: Sequence[str]) -> bool:
    """Whether all stages are done, or one has failed and none waits or runs."""
    failed = [word for word in states if word in FINAL or word == "FAILED (gone)"]
    resting = [word for word in states if word in ("DONE", "TODO", "STALE")]
    return states.count("DONE") == len(states) or bool(failed and len(failed) + len(resting) == len(states))


def is_launched(chain: Chain) -> bool:
    """Whether a launcher is at work on the chain here: it may start the next stage."""
    try:
        holder = re.match(r"process (\d+) on (\S+),", chain.dir.lock.read_text())
    except FileNotFoundError:
        return False
    return bool(holder and holder[2] == socket.gethostname() and Path(f"/proc/{holder[1]}").exists())


def _is_terminal() -> bool:
    return sys.stdout.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


@contextlib.contextmanager
def _lines(chain: Chain) -> Iterator[Show]:
    """Prints the table whenever something has happened: steps and rates are new at every look."""
    before: list[object] = []

    def show(rows: Sequence[Sequence[str]], notes: Sequence[str]) -> None:
        problems = [note.partition(" (since ")[0] for note in notes]  # the times in a note change by themselves
        now = [*([row[COLUMNS.index(name)] for name in NEWS] for row in rows), problems]
        if now != before:
            before[:] = now
            print(status.title(chain), status.columns([COLUMNS, *rows]), *notes, "", sep="\n", flush=True)

    yield show


@contextlib.contextmanager
def _terminal(chain: Chain) -> Iterator[Show]:
    """Draws the table in place."""
    from rich.console import Console  # as long as the rest of --status
    from rich.live import Live

    console = Console(force_terminal=True, highlight=False)
    with Live(console=console, auto_refresh=False) as live:
        yield lambda rows, notes: live.update(drawn(chain, rows, notes, console.width), refresh=True)


def drawn(chain: Chain, rows: Sequence[Sequence[str]], notes: Sequence[str], width: int) -> Group:
    """The table for a terminal so wide; causes and logs below it."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, GAP, 0, 0), pad_edge=False)
    shown = fitting(rows, width)
    for index in shown:
        table.add_column(Text(COLUMNS[index]), no_wrap=COLUMNS[index] != "state", overflow="fold")
    below = []
    for row in rows:
        cells = dict(zip(COLUMNS, row, strict=True))
        style = STYLES.get(row[1].partition(" ")[0], "red" if row[1] in FINAL or "gone" in row[1] else "")
        table.add_row(*(Text(row[index], style if COLUMNS[index] == "state" else "") for index in shown))
        if cells["cause"]:
            below += [Text(f"{cells['stage']}: {cells['cause']}", style, overflow="fold")]
            below += [Text(f"  {cells['log']}", overflow="fold")] if cells["log"] else []
    clock = Text(f"{_local(state.now())}  Ctrl-C ends this display, not the chain", "dim", no_wrap=True)
    title = Text(status.title(chain), "bold", no_wrap=True, overflow="ellipsis")
    return Group(title, table, *below, *(Text(note, "yellow", overflow="fold") for note in notes), clock)


def fitting(rows: Sequence[Sequence[str]], width: int) -> list[int]:
    """The columns that there is room for; a state may take two lines."""
    widths = {name: max(map(len, (name, *(row[at] for row in rows)))) for at, name in enumerate(COLUMNS)}
    widths["state"] = max(len(word) for row in rows for word in ("state", *row[1].split(" ")))
    for name in (*BELOW, *OPTIONAL):
        if name in BELOW or sum(widths.values()) + GAP * (len(widths) - 1) > width:
            del widths[name]
    return [at for at, name in enumerate(COLUMNS) if name in widths]
