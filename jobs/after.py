"""What becomes of a job when its ranks have ended, by the stage's marker: slurm/common.sh asks in the batch shell.

    python -m jobs.after SRUN_EXIT STAGE [WORDS...]     # the words of jobs.worker

srun's exit code alone says too little: it is that of any of the ranks, also of one that srun itself has killed.
Exit codes: 99 stopped with its work saved, or by nothing but a signal: requeue the job; else what the job ends with.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jobs import page, state, worker
from jobs.stages import Chain
from utils import env, stop
from utils.errors import EnvironmentProblem, RelayError, Stopped, cli

REQUEUE = 99


def decide(chain: Chain, stage: str, words: Sequence[str], code: int, deaths: Path) -> int:
    """The job's exit code when srun ended with `code`; a marker that no rank could finish is finished here."""
    record = state.marker(chain, stage)
    killed = _first(deaths)
    if (record.get("job_id"), record.get("restarts")) != (env.job_id(), env.restarts()):
        other = record["status"] == "running" and record["job_id"] != env.job_id()
        if code - 128 not in stop.SIGNALS or record["status"] == "done" or other:
            return code  # done before, or refused before it began
        _begun(chain, stage, words)  # the signal came in a rank's first milliseconds
        record = state.marker(chain, stage)
    if record["status"] == "running":
        error = silent_end(killed.code if killed else code, f"rank {killed.rank}" if killed else "srun or a rank")
        state.finish(chain, stage, error, record["log"])
        print(f"{stage}: {error}", file=sys.stderr, flush=True)
    elif record["status"] == "failed" and killed and killed.time < chain.run_dir(stage).state.stat().st_mtime:
        state.update(chain, stage, cause=f"{silent_end(killed.code, f'rank {killed.rank}')}; then: {record['cause']}")
    record = state.marker(chain, stage)
    match record["status"]:
        case "done":
            return 0
        case "preempted":
            return REQUEUE
    return record["exit_code"]


def _begun(chain: Chain, stage: str, words: Sequence[str]) -> None:
    """Mark an attempt that did not get to do so, so that it counts. Raises: EnvironmentProblem for one too many."""
    log = chain.run_dir(stage).rank_log(env.job_id(), env.restarts(), 0)
    try:
        state.running(chain, stage, chain.resolve(stage, words), log)
    except EnvironmentProblem as error:
        state.finish(chain, stage, error, log)
        raise


class Death(NamedTuple):
    time: float
    rank: str
    code: int


def _first(deaths: Path) -> Death | None:
    """The first rank that was killed; the ranks' shells have noted it in `deaths`."""
    noted = [
        Death(file.stat().st_mtime, file.name, int(text))
        for file in deaths.glob("*")
        if (text := file.read_text().strip())  # empty on a full disk
    ]
    shutil.rmtree(deaths, ignore_errors=True)
    return min(noted, default=None)


def silent_end(code: int, who: str) -> RelayError:
    """Why a process that left no cause ended, by its exit code, a shell's or Python's."""
    number = code - 128 if code > 128 else -code
    if number <= 0 or number not in set(signal.Signals):
        return RelayError(f"{who} ended with exit code {code} without a word")
    hint = " (out of memory?)" if number == signal.SIGKILL else ""
    text = f"{who} was killed by signal {number}, {signal.Signals(number).name}{hint}"
    return (
        Stopped(f"{text}, before it had saved; the same again goes on") if number in stop.SIGNALS else RelayError(text)
    )


def main(argv: Sequence[str] | None = None) -> None:
    code, *words = sys.argv[1:] if argv is None else argv
    chain, stage, rest = worker.parse(words)
    ends_with = decide(chain, stage, rest, int(code), Path(os.environ["RELAY_DEATHS"]))
    if ends_with == 0 and (made := page.make(chain)):
        print(made, flush=True)
    sys.exit(ends_with)


if __name__ == "__main__":
    cli(main)
