"""Stages on this machine, one after the other."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from jobs import page, state, status, store, worker
from jobs.after import silent_end
from jobs.plan import Step
from jobs.stages import Chain
from utils import env, mirror_views, stop
from utils.errors import InputError, RelayError, Stopped
from utils.paths import ROOT


class StageFailed(RelayError):
    """A stage ended with `exit_code`."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.exit_code = code


def command(chain: Chain, step: Step, ranks: int) -> list[str]:
    """The command line of one stage: one process, torchrun, or a process for each of this machine's chips.

    Raises: InputError.
    """
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    words = chain.worker_words(step.stage, step.words)
    if step.config.get("device") == "xla":
        if ranks > 1:
            raise InputError(f"{step.stage}: --ranks {ranks}: device=xla has a rank for each chip; leave out --ranks")
        return [sys.executable, "-m", "utils.xla_run", "-m", "jobs.worker", *words]
    return [sys.executable, *(torchrun if ranks > 1 else []), "-m", "jobs.worker", *words]


def run(chain: Chain, steps: Sequence[Step], ranks: int, debug: bool) -> None:
    """Run the steps of a plan; with `debug` inside this process.

    Raises: InputError; StageFailed; Stopped by a signal, with the stage's work saved; with `debug` what the stage
    raises.
    """
    # all at once: one that cannot be started is refused before another is begun
    commands = {step.stage: command(chain, step, ranks) for step in steps if step.action != "skip"}
    for step in steps:
        if step.action == "skip":
            print(f"{step.stage}: done already, skipped", flush=True)
            continue
        if step.action == "again":
            aside = store.set_aside(chain, step.stage)
            print(f"{step.stage}: what was done before is now in {aside}", flush=True)
        print(f"{step.stage}: starting", flush=True)
        if debug:
            worker.run(chain, step.stage, step.words)
            continue
        with subprocess.Popen(commands[step.stage], cwd=ROOT) as process, _passing_on_to(process):
            code = process.wait()
        record = state.marker(chain, step.stage)
        if code or record["status"] == "preempted":
            raise _failure(chain, step.stage, code, env.job_id() if env.in_slurm() else str(process.pid))


@contextlib.contextmanager
def _passing_on_to(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Who asks the launcher to end means the stage; as TERM, the one that torchrun passes on too."""
    before = {number: signal.signal(number, lambda *_: process.terminate()) for number in stop.SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _failure(chain: Chain, stage: str, code: int, job: str) -> RelayError:
    record = state.marker(chain, stage)
    if record.get("job_id") != job:
        return StageFailed(f"{stage}: refused before it began, see above", code)
    if record["status"] == "running":  # it had no time to say why
        state.finish(chain, stage, silent_end(code, "its process"), record["log"])
        record = state.marker(chain, stage)
    if record["status"] == "done":
        return StageFailed(f"{stage} is done, but its process ended with exit code {code}, see above", code)
    if record["status"] == "preempted":
        return Stopped(f"{stage}: {record['cause']}")
    return StageFailed(f"{stage} failed: {record['cause']} (log: {record['log']})", record["exit_code"])


def results(chain: Chain) -> str:
    """What the chain has made: a table of the stages, every output's path, and the table of the report."""
    lines = [status.table(chain), ""]
    table: list[str] = []
    for stage in chain.stages:
        record = state.read(chain, stage)
        if record["status"] == "done":
            for name, output in record["outputs"].items():
                lines.append(f"{stage} {name}: {output['path']}")
                if name == "report":
                    if chain.store:
                        mirror_views.pull(chain.url(stage), chain.run_dir(stage).path)
                    report = Path(output["path"]).read_text().splitlines()
                    table = [line for line in report if line.lstrip().startswith("Average ")]
    if made := page.make(chain):
        lines.append(made)
    return "\n".join([*lines, "", *table])
