"""Stages on this machine, one after the other."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from jobs import state, status, worker
from jobs.plan import Step
from jobs.stages import Chain
from utils import env, paths
from utils.errors import RelayError
from utils.paths import ROOT


class StageFailed(RelayError):
    """A stage ended with `exit_code`."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.exit_code = code


def command(chain: Chain, step: Step, ranks: int) -> list[str]:
    """The command line of one stage: one process, or torchrun."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    words = chain.worker_words(step.stage, step.words)
    return [sys.executable, *(torchrun if ranks > 1 else []), "-m", "jobs.worker", *words]


def run(chain: Chain, steps: Sequence[Step], ranks: int, debug: bool) -> None:
    """Run the steps of a plan; with `debug` inside this process.

    Raises: StageFailed; with `debug` what the stage raises.
    """
    for step in steps:
        if step.action == "skip":
            print(f"{step.stage}: done already, skipped", flush=True)
            continue
        if step.action == "again":
            aside = paths.set_aside(chain.run_dir(step.stage).path)
            print(f"{step.stage}: what was done before is now in {aside}", flush=True)
        print(f"{step.stage}: starting", flush=True)
        if debug:
            worker.run(chain, step.stage, step.words)
            continue
        with subprocess.Popen(command(chain, step, ranks), cwd=ROOT) as process:
            code = process.wait()
        if code:
            raise _failure(chain, step.stage, code, env.job_id() if env.in_slurm() else str(process.pid))


def _failure(chain: Chain, stage: str, code: int, job: str) -> StageFailed:
    record = state.read(chain, stage)
    if record.get("job_id") != job:
        return StageFailed(f"{stage}: refused before it began, see above", code)
    if record["status"] == "running":  # it had no time to say why
        cause = f"killed by signal {-code}" if code < 0 else f"exit code {code} without a word"
        state.update(chain, stage, status="failed", cause=cause, exit_code=1, ended=state.now())
        record = state.read(chain, stage)
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
                    report = Path(output["path"]).read_text().splitlines()
                    table = [line for line in report if line.lstrip().startswith("Average ")]
    return "\n".join([*lines, "", *table])
