"""One rank of one stage: what srun, submitit, torchrun and the local launcher all run, once per rank.

    python -m jobs.worker r2                                        # one process
    torchrun --nproc-per-node 2 -m jobs.worker r2 --lr 0.001        # further words go to the stage's program
    srun python -m jobs.worker r2 --file jobs/demo.yaml --name mine

Exit codes: 0 done (now or before), 2 bad input or a parent that is not done, others as the program's.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jobs import stages, state
from jobs.stages import Chain
from utils import env, files, log
from utils.errors import InputError, cli
from utils.paths import CHAIN_FILE


class Task:
    """A worker as submitit pickles it: by reference and with plain words only."""

    def __init__(self, argv: Sequence[str]) -> None:
        self.argv = list(argv)

    def __call__(self) -> None:
        cli(lambda: main(self.argv))

    def checkpoint(self) -> Any:
        """Called before the time limit and on preemption: the same again, `resume: auto` does the rest."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def run(chain: Chain, stage: str, words: Sequence[str]) -> None:
    """Check the stage's parents, run its program in this process, and keep its marker.

    Returns at once when the stage is done. Raises: InputError; whatever the program raises.
    """
    resolved = chain.resolve(stage, words)
    run_dir, rank = chain.run_dir(stage), env.world().rank
    log_file = run_dir.rank_log(env.job_id(), env.restarts(), rank)
    log.setup(rank, log_file)
    if state.is_done(chain, stage, resolved):
        log.info(f"{stage} is already done: {run_dir.path}")
        return
    if state.read(chain, stage)["status"] == "stale":
        raise InputError(
            f"{stage} has begun from something its parent does not have any more; "
            f"python jobs/launch.py --from {stage} sets it aside and trains it again"
        )
    with _alone(chain, stage, rank):
        try:
            inputs = _inputs(chain, stage, resolved)
        except InputError as error:
            if rank == 0:
                state.running(chain, stage, resolved, log_file)
                state.failed(chain, stage, error, log_file)
            raise
        try:
            if rank == 0:
                state.running(chain, stage, resolved, log_file, inputs)
            state.wait_until_running(chain, stage)
            paths = {key: source["path"] for key, source in inputs.items() if source["from"]}
            program = importlib.import_module(chain.stages[stage].module)
            result = program.main(chain.argv(stage, words, paths))
            if rank == 0:
                state.done(chain, stage, result)
        except BaseException as error:
            with open(log_file, "a") as file:  # srun's own output may lose it when a rank dies
                traceback.print_exc(file=file)
            state.failed(chain, stage, error, log_file)
            raise
    log.info(f"{stage} is done: {', '.join(map(str, result['outputs'].values()))}")


@contextlib.contextmanager
def _alone(chain: Chain, stage: str, rank: int) -> Iterator[None]:
    """Keep a second run of the stage on this node out of its directory."""
    with contextlib.ExitStack() as stack:
        if rank == 0:
            try:
                stack.enter_context(files.lock(chain.run_dir(stage).lock, blocking=False))
            except BlockingIOError:
                other = state.read(chain, stage)
                where = f"job {other.get('job_id')} on {other.get('host')}"
                raise InputError(f"{stage} of chain {chain.name} is running already: {where}") from None
        yield


def _inputs(chain: Chain, stage: str, resolved: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The stage's inputs: config key -> path, sha256, and the `stage.output` it is `from`, if it is.

    Raises: InputError when a parent is not done, or an input is not the file the parent left.
    """
    found: dict[str, dict[str, Any]] = {}
    needed = chain.needs(stage, resolved)
    for key, source in chain.stages[stage].inputs.items():
        if (given := resolved[key]) != source:  # by hand; null is a choice too
            found[key] = {"from": None, **_checked(key, given)} if given else {"from": None, "path": None}
            continue
        parent, _, output = source.partition(".")
        record = state.read(chain, parent)
        if record["status"] == "done":
            found[key] = {"from": source, **_checked(f"{source}", record["outputs"][output]["path"])}
            if found[key]["sha256"] != record["outputs"][output]["sha256"]:
                path = found[key]["path"]
                raise InputError(f"{path} is not the file that {parent} left (its sha256 differs); run {parent} again")
        elif parent in needed:
            raise InputError(f"parent {parent} is {_describe(record)}")
    return found


def _checked(what: str, path: str) -> dict[str, str]:
    if not Path(path).is_file():
        raise InputError(f"{what}: {path}: no such file")
    return state.fingerprint(Path(path))


def _describe(record: Mapping[str, Any]) -> str:
    if record["status"] == "failed":
        return f"failed: {record['cause']} (log: {record['log']})"
    if record["status"] == "running":
        return f"not done: running as job {record['job_id']} on {record['host']}"
    return f"not done: {record['status']}"


def parse(argv: Sequence[str] | None) -> tuple[Chain, str, list[str]]:
    """The chain, the stage and the words for its program. Raises: InputError."""
    parser = argparse.ArgumentParser(prog="jobs.worker", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("stage")
    parser.add_argument("--file", type=Path, default=CHAIN_FILE, help="chain file (default: %(default)s)")
    parser.add_argument("--name", help="chain name: runs/NAME/ (default: the chain file's)")
    arguments, words = parser.parse_known_args(argv)
    chain = stages.load(arguments.file, arguments.name)
    return chain, chain.stage(arguments.stage).name, words


def main(argv: Sequence[str] | None = None) -> None:
    run(*parse(argv))


if __name__ == "__main__":
    try:
        cli(main)
    except KeyboardInterrupt:  # the log has the traceback
        sys.exit(130)
