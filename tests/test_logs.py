"""`--logs`: a stage's logs over its restarts, what else tells how it failed, and what comes while it runs."""

from __future__ import annotations

import io
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs import logs, stages, state
from jobs.logs import print_logs
from jobs.stages import Chain
from tests.test_status import submit
from utils import paths
from utils.errors import InputError, RelayError, Stopped
from utils.paths import ROOT

DONE = {"outputs": {}, "epochs": 1, "metrics": {}}


@pytest.fixture
def chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Chain:
    monkeypatch.setattr(paths, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(logs, "PAUSE", 0.02)
    return stages.load(ROOT / "tests/standin/chain.yaml")


def attempt(chain: Chain, text: str, job: str = "7", restarts: int = 0, rank: int = 0, began: float = 0) -> Path:
    """Rank's log of one attempt, last written at a time."""
    log = chain.run_dir("r2").rank_log(job, restarts, rank)
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a") as file:
        file.write(text)
    os.utime(log, (began, began))
    return log


def mark(chain: Chain, log: Path, **values: object) -> None:
    """Mark r2 as a Slurm job's."""
    state.running(chain, "r2", {}, log, {})
    state.update(chain, "r2", **{"slurm": True, "job_id": "7", **values})


def printed(chain: Chain, capsys: pytest.CaptureFixture[str]) -> str:
    print_logs(chain, "r2", follow=False)
    return capsys.readouterr().out


def test_all_attempts_in_the_order_in_which_they_began(chain: Chain, capsys: pytest.CaptureFixture[str]) -> None:
    third = attempt(chain, "third\nno end", job="12", began=300)
    first = attempt(chain, "first\n", job="7", restarts=0, began=100)
    second = attempt(chain, "second\n", job="7", restarts=1, began=200)
    attempt(chain, "not shown\n", job="7", rank=1, began=150)
    parts = [
        f"==> {log} <==\n{text}\n" for log, text in ((first, "first"), (second, "second"), (third, "third\nno end"))
    ]
    assert printed(chain, capsys) == "\n".join(parts)
    times = chain.run_dir("r2").times
    times.mkdir()
    for name in ("7_0_50.25", "7_1_20.00", "12_0_30.50"):  # when each began, where a copy has lost the files' times
        (times / f"{name}.json").touch()
    assert [line for line in printed(chain, capsys).splitlines() if line.startswith("==>")] == [
        f"==> {log} <==" for log in (second, third, first)
    ]


def test_a_stage_without_logs_is_refused_with_those_that_have_some(chain: Chain) -> None:
    with pytest.raises(InputError, match=r"^r3 of chain standin has no logs yet \(nor has another stage\); -f waits"):
        print_logs(chain, "r3", follow=False)
    attempt(chain, "said\n")
    with pytest.raises(InputError, match=r"^r3 of chain standin has no logs yet \(there are of r2\); -f waits"):
        print_logs(chain, "r3", follow=False)
    with pytest.raises(InputError, match="no stage 'r9'"):
        print_logs(chain, "r9", follow=True)


def test_a_failure_shows_its_rank_and_what_only_slurm_was_told(
    chain: Chain, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = attempt(chain, "step 1\nTraceback\nlost another rank\n")
    theirs = attempt(chain, "Traceback\nno disk\n", rank=1)
    mark(chain, ours)
    output = chain.dir.submitted / "7_0_log.out"
    output.parent.mkdir()
    output.write_text("step 1\nTraceback\nno disk\n\nlost another rank\nsrun: error: n1: task 1: Exited\n")
    first = f"==> {ours} <==\nstep 1\nTraceback\nlost another rank\n"
    assert printed(chain, capsys) == (
        f"{first}\n==> {output} (what no log above has) <==\nno disk\nsrun: error: n1: task 1: Exited\n"
    )
    state.update(chain, "r2", status="failed", cause="no disk", log=str(theirs))
    last = f"==> {output} (what no log above has) <==\nsrun: error: n1: task 1: Exited\n"
    assert printed(chain, capsys) == f"{first}\n==> {theirs} <==\nTraceback\nno disk\n\n{last}"
    state.update(chain, "r2", status="done")
    assert printed(chain, capsys) == first, "nobody asks how what is done failed"


@pytest.mark.parametrize("by", ["launcher", "sbatch"])
def test_a_job_that_ended_before_its_program_began(chain: Chain, capsys: pytest.CaptureFixture[str], by: str) -> None:
    submit(chain, r2="7")
    output = {"launcher": chain.dir.submitted / "7_0_log.out", "sbatch": paths.RUNS / "demo_r2_7.out"}[by]
    output.parent.mkdir(exist_ok=True)
    output.write_text("module: command not found\n")
    (output.parent / "demo_r2_17.out").write_text("another job\n")
    assert printed(chain, capsys) == f"==> {output} <==\nmodule: command not found\n"


def test_what_is_printed_changes_nothing_of_the_terminal(chain: Chain, capsys: pytest.CaptureFixture[str]) -> None:
    log = attempt(chain, "")
    log.write_bytes("\x1b[2Jé\ta\x07\n".encode() + b"10%\r50%\r100%\r\n\xff\n")
    assert printed(chain, capsys) == f"==> {log} <==\n?[2Jé\ta?\n100%\n\N{REPLACEMENT CHARACTER}\n"


class Followed:
    """`--logs r2 -f` in a thread."""

    def __init__(self, chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
        self.output, self.failed = io.StringIO(), False
        monkeypatch.setattr("sys.stdout", self.output)
        self.thread = threading.Thread(target=self._run, args=(chain,), daemon=True)
        self.thread.start()

    def _run(self, chain: Chain) -> None:
        self.failed = True
        print_logs(chain, "r2", follow=True)
        self.failed = False

    def until(self, condition: Callable[[str], bool]) -> None:
        end = time.monotonic() + 30
        while not condition(self.output.getvalue()):
            assert time.monotonic() < end and self.thread.is_alive(), self.output.getvalue()
            time.sleep(0.01)

    def ended(self) -> str:
        self.thread.join(30)
        assert (self.thread.is_alive(), self.failed) == (False, False)
        return self.output.getvalue()


def test_following_goes_over_to_the_next_attempt_and_ends_with_the_stage(
    chain: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = io.StringIO()
    monkeypatch.setattr("sys.stderr", waits)
    followed = Followed(chain, monkeypatch)
    followed.until(lambda _: waits.getvalue() == "r2 of chain standin has not begun; waiting\n")
    first = attempt(chain, "one\n", began=100)
    mark(chain, first)
    followed.until(lambda text: text.endswith("one\n"))
    attempt(chain, "tw", began=100)
    attempt(chain, "o\nthr", began=100)
    followed.until(lambda text: text.endswith("two\n"))
    state.finish(chain, "r2", Stopped("asked to"), first)
    second = attempt(chain, "four\n", restarts=1, began=200)
    mark(chain, second, restarts=1)
    followed.until(lambda text: text.endswith("four\n"))
    seen = followed.output.getvalue()
    looked = logs._has_ended
    late = ["it is done: this comes after the marker\n", "and this has no end"]

    def has_ended(*args: object) -> bool:
        over = looked(*args)  # type: ignore[arg-type]
        if over and late:
            attempt(chain, late.pop(0), restarts=1, began=200)
        return over

    monkeypatch.setattr(logs, "_has_ended", has_ended)
    state.done(chain, "r2", DONE)
    assert seen == f"==> {first} <==\none\ntwo\n\n==> {second} <==\nfour\n"
    rest = "it is done: this comes after the marker\n\n==> {} <==\nthr\n\n==> {} <==\nand this has no end\n"
    assert followed.ended() == seen + rest.format(first, second)


def test_following_waits_for_the_job_that_is_queued_after_a_failure(
    chain: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = attempt(chain, "one\n")
    mark(chain, log, started="2019-01-01T00:00:00+00:00")
    state.finish(chain, "r2", RelayError("no"), log)
    submit(chain, r2="8")
    looks: list[bool] = []
    looked = logs._has_ended

    def has_ended(*args: object) -> bool:
        looks.append(looked(*args))  # type: ignore[arg-type]
        return looks[-1]

    monkeypatch.setattr(logs, "_has_ended", has_ended)
    followed = Followed(chain, monkeypatch)
    followed.until(lambda text: "one\n" in text and len(looks) > 3)
    begun = attempt(chain, "two\n", job="8")
    followed.until(lambda text: "two\n" in text)
    mark(chain, begun, job_id="8")
    state.finish(chain, "r2", RelayError("no"), begun)
    assert followed.ended() == f"==> {log} <==\none\n\n==> {begun} <==\ntwo\n"


def test_following_says_that_an_attempt_was_stopped_and_waits_for_the_next(
    chain: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = io.StringIO()
    monkeypatch.setattr("sys.stderr", waits)
    log = attempt(chain, "one\n")
    mark(chain, log)
    state.finish(chain, "r2", Stopped("asked\x1b[2J to"), log)
    followed = Followed(chain, monkeypatch)
    told = "r2 of chain standin was stopped (asked?[2J to); waiting for its next attempt\n"
    followed.until(lambda _: waits.getvalue() == told)
    mark(chain, log, restarts=1)
    with open(log, "a") as file:
        file.write("two\n")
    followed.until(lambda text: text.endswith("two\n"))
    assert waits.getvalue() == told, "once"
    state.finish(chain, "r2", Stopped("again"), log)
    followed.until(lambda _: waits.getvalue() == told + told.replace("asked?[2J to", "again"))
    mark(chain, log, restarts=2)
    state.done(chain, "r2", DONE)
    assert followed.ended() == f"==> {log} <==\none\ntwo\n"


def test_following_ends_with_what_was_stopped_here_once_no_launcher_is_at_work(
    chain: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = io.StringIO()
    monkeypatch.setattr("sys.stderr", waits)
    log = attempt(chain, "one\n")
    mark(chain, log, slurm=False, job_id="999999999", host="elsewhere")
    state.finish(chain, "r2", Stopped("Ctrl-C"), log)
    looks: list[bool] = []
    looked = logs._has_ended

    def has_ended(*args: object) -> bool:
        looks.append(looked(*args))  # type: ignore[arg-type]
        return looks[-1]

    def look_again() -> None:
        count = len(looks)
        followed.until(lambda _: len(looks) > count + 2)

    monkeypatch.setattr(logs, "_has_ended", has_ended)
    followed = Followed(chain, monkeypatch)
    look_again()  # on another machine it may go on
    chain.dir.lock.write_text(f"process {os.getpid()} on {socket.gethostname()}, cluster local\n")
    state.update(chain, "r2", host=socket.gethostname())
    look_again()  # the launcher may come to this stage
    chain.dir.lock.write_text(f"process 999999999 on {socket.gethostname()}, cluster local\n")
    assert followed.ended() == f"==> {log} <==\none\n"
    assert waits.getvalue().count("was stopped (Ctrl-C)") == 1


def test_following_ends_with_a_process_here_that_is_gone(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    log = attempt(chain, "one\n")
    mark(chain, log, slurm=False, job_id="999999999")
    assert Followed(chain, monkeypatch).ended() == f"==> {log} <==\none\n"


def test_what_a_tpu_vm_says_is_followed_and_not_told_again_when_its_logs_are_here(
    chain: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = chain.dir.submitted / "tpu_r2.log"
    remote.parent.mkdir(parents=True)
    remote.write_text("one\n")
    followed = Followed(chain, monkeypatch)
    followed.until(lambda text: text.endswith("one\n"))
    with open(remote, "a") as file:
        file.write("two\n")
    followed.until(lambda text: text.endswith("two\n"))
    log = attempt(chain, "one\ntwo\n", job="33", began=time.time() + 60)
    mark(chain, log, slurm=False, job_id="33", host="elsewhere")
    state.done(chain, "r2", DONE)
    assert followed.ended() == f"==> {remote} <==\none\ntwo\n"
    later = io.StringIO()
    monkeypatch.setattr("sys.stdout", later)
    print_logs(chain, "r2", follow=False)
    assert later.getvalue() == f"==> {log} <==\none\ntwo\n"
