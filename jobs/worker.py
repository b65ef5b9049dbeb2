"""One rank of one stage: what srun, torchrun and the local launcher all run, once per rank.

    python -m jobs.worker r2                                        # one process
    torchrun --nproc-per-node 2 -m jobs.worker r2 --lr 0.001        # further words go to the stage's program
    srun python -m jobs.worker r2 --file jobs/demo.yaml --name mine

Exit codes: 0 done (now or before), or stopped by a signal with its work saved (see the marker); 2 bad input or a
parent that is not done; others as the program's.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jobs import stages, state, store
from jobs.stages import Chain
from utils import ahead, checkpoint_files, env, files, log, mirror, mirror_views, paths, run_lock, timeline
from utils.errors import InputError, Stopped, cli
from utils.paths import CHAIN_FILE, RunDir


def run(chain: Chain, stage: str, words: Sequence[str]) -> None:
    """Check the stage's parents, run its program in this process, and keep its marker.

    Returns at once when the stage is done. Raises: InputError; Stopped; whatever the program raises.
    """
    resolved = chain.resolve(stage, words)
    run_dir, rank = chain.run_dir(stage), env.world().rank
    log_file = run_dir.rank_log(env.job_id(), env.restarts(), rank)
    paths.make_private(run_dir.path)
    log.setup(rank, log_file)
    with files.lock(chain.dir.path / ".mirror.lock"):  # by one rank of a machine after the other
        store.refresh(chain)
    if state.is_done(chain, stage, resolved):
        log.info(f"{stage} is already done: {run_dir.path}")
        return
    if state.read(chain, stage)["status"] == "stale":
        raise InputError(
            f"{stage} has begun from something its parent does not have any more; "
            f"python jobs/launch.py --from {stage} sets it aside and trains it again"
        )
    with _alone(run_dir, rank), mirror.kept(run_dir, rank):
        try:
            sources = _sources(chain, stage, resolved)
        except InputError as error:
            if rank == 0:
                state.running(chain, stage, resolved, log_file)
                state.ended(chain, stage, error, log_file)
            raise
        try:
            if rank == 0:
                state.running(chain, stage, resolved, log_file)
            state.wait_until_running(chain, stage)
            ahead.begin(_to_hash(run_dir, resolved, sources, rank))
            program = importlib.import_module(chain.stages[stage].module)  # seconds, for torch
            timeline.done("start-up", "imports")
            inputs = _inputs(sources)
            timeline.done("start-up", "inputs")
            if rank == 0:
                state.update(chain, stage, inputs=inputs)
            given = {key: source["path"] for key, source in inputs.items() if source["from"]}
            result = program.main(chain.argv(stage, words, given))
            if rank == 0:
                state.done(chain, stage, result)
        except Stopped as stopped:
            log.info(f"{stage} {stopped}")
            if rank == 0:  # all ranks stop alike
                state.ended(chain, stage, stopped, log_file)
            raise
        except BaseException as error:
            state.ended(chain, stage, error, log_file)
            # srun's own output may lose it when a rank dies; the disk may be what failed
            with contextlib.suppress(OSError), open(log_file, "a") as file:
                traceback.print_exc(file=file)
            raise
    log.info(f"{stage} is done: {', '.join(map(str, result['outputs'].values()))}")


@contextlib.contextmanager
def _alone(run_dir: RunDir, rank: int) -> Iterator[None]:
    """Keep every other run of the stage out of its directory."""
    with run_lock.owned(run_dir) if rank == 0 else contextlib.nullcontext():
        yield


class Source(NamedTuple):
    """Where an input comes from."""

    output: str | None  # `stage.output`; None if it was given by hand
    path: Path | None
    sha256: str | None  # of what the parent left


def _sources(chain: Chain, stage: str, resolved: Mapping[str, Any]) -> dict[str, Source]:
    """Config key -> where that input of the stage is. Raises: InputError when it is missing or a parent is not done."""
    found: dict[str, Source] = {}
    needed = chain.needs(stage, resolved)
    for key, source in chain.stages[stage].inputs.items():
        if (given := resolved[key]) != source:  # by hand; null is a choice too
            given = given and str(mirror_views.fetch(given, paths.staging_root(chain.run_dir(stage))))
            found[key] = Source(None, _existing(key, given) if given else None, None)
            continue
        parent, _, output = source.partition(".")
        record = state.read(chain, parent)
        if record["status"] == "done":
            if chain.store:
                mirror_views.pull(chain.url(parent), chain.run_dir(parent).path)
            left = record["outputs"][output]
            found[key] = Source(source, _existing(source, left["path"]), left["sha256"])
        elif parent in needed:
            raise InputError(f"parent {parent} is {_describe(record)}")
    return found


def _existing(what: str, path: str) -> Path:
    if not Path(path).is_file():
        raise InputError(f"{what}: {path}: no such file")
    return Path(path)


def _to_hash(run_dir: RunDir, resolved: Mapping[str, Any], sources: Mapping[str, Source], rank: int) -> list[Path]:
    """The files whose hashes will be asked for: of the inputs, and of the checkpoint to go on from."""
    paths = [source.path for source in sources.values() if source.path]
    own = checkpoint_files.newest(run_dir.checkpoints) if rank == 0 and resolved.get("resume") == "auto" else None
    return [*paths, own] if own else paths


def _inputs(sources: Mapping[str, Source]) -> dict[str, dict[str, Any]]:
    """The marker's entry on each input. Raises: InputError when one is not the file that its parent left."""
    found: dict[str, dict[str, Any]] = {}
    for key, (output, path, sha256) in sources.items():
        found[key] = {"from": output, **(state.fingerprint(path) if path else {"path": None})}
        if output and found[key]["sha256"] != sha256:
            parent = output.partition(".")[0]
            raise InputError(f"{path} is not the file that {parent} left (its sha256 differs); run {parent} again")
    return found


def _describe(record: Mapping[str, Any]) -> str:
    if record["status"] == "failed":
        return f"failed: {record['cause']} (log: {record['log']})"
    if record["status"] == "running":
        return f"not done: running as job {record['job_id']} on {record['host']}"
    if record["status"] == "preempted":
        return f"not done: {record['cause']}"
    return f"not done: {record['status']}"


def parse(argv: Sequence[str] | None) -> tuple[Chain, str, list[str]]:
    """The chain, the stage and the words for its program. Raises: InputError."""
    parser = argparse.ArgumentParser(prog="jobs.worker", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("stage")
    parser.add_argument("--file", type=Path, default=CHAIN_FILE, help="chain file (default: %(default)s)")
    parser.add_argument("--name", help="chain name: runs/NAME/ (default: the chain file's)")
    parser.add_argument("--store", help="where run directories are kept too (default: the chain file's)")
    arguments, words = parser.parse_known_args(argv)
    chain = stages.load(arguments.file, arguments.name, arguments.store)
    return chain, chain.stage(arguments.stage).name, words


def main(argv: Sequence[str] | None = None) -> None:
    run(*parse(argv))


if __name__ == "__main__":
    try:
        cli(main)
    except KeyboardInterrupt:  # the log has the traceback
        sys.exit(130)
