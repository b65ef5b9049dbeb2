"""How far a stage is: its marker `state.json`, written by the worker, read by everybody."""

from __future__ import annotations

import datetime
import json
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jobs.stages import Chain
from utils import ahead, checkpoint_files, env, files, mirror, run_lock
from utils.errors import EnvironmentProblem, InputError, Stopped, exit_code, one_line
from utils.shared_config import MACHINE_KEYS

PATIENCE = 120  # seconds; a network file system may show a new file late
ROOM = 1 << 14  # bytes; a marker is a few thousand
# What every marker has from the beginning; `running` writes more.
KEYS = frozenset(("status", "job_id", "host", "restarts", "cause", "log", "started", "ended", "config", "inputs"))
MAX_IDLE = 3  # restarts in a row of one job that came no further; evaluation saves nothing on its way


def read(chain: Chain, stage: str) -> dict[str, Any]:
    """The stage's marker. `status` is todo, running, preempted, failed, done or stale.

    preempted: stopped by a signal, with its work saved. stale: made from something that its parent, trained again
    or not done any more, does not have.
    """
    record = marker(chain, stage)
    for source in record["inputs"].values():
        if source["from"]:
            parent, _, output = source["from"].partition(".")
            now = read(chain, parent)
            if now["status"] != "done" or now["outputs"].get(output, {}).get("sha256") != source["sha256"]:
                return {**record, "status": "stale"}
    return record


def marker(chain: Chain, stage: str) -> dict[str, Any]:
    """The stage's marker as it was written. Raises: InputError when the file is damaged."""
    file = chain.run_dir(stage).state
    try:
        record = json.loads(file.read_text())
        if record.keys() >= KEYS:
            return record
    except FileNotFoundError:
        return {"status": "todo", "inputs": {}}
    except (ValueError, AttributeError):
        pass
    raise InputError(f"{file} is damaged; remove it: the stage goes on from its checkpoints then")


def is_done(chain: Chain, stage: str, resolved: Mapping[str, Any]) -> bool:
    """Whether the stage is done with this configuration. Raises: InputError if it is with another one."""
    record = read(chain, stage)
    if record["status"] != "done":
        return False
    before = dict(record["config"])
    for key, source in record["inputs"].items():  # a parent's output by its path is the same input
        before[key] = resolved[key] if resolved[key] == source["path"] else source["from"] or source["path"]
    if changed := differences(before, resolved):
        raise InputError(
            f"{stage} of chain {chain.name} is done with another configuration: {', '.join(changed)}; "
            f"use --from {stage} to train it again or --name for another chain"
        )
    return True


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """`key old -> new` for what gives a stage another result."""
    shared = [key for key in before if key in now and key not in MACHINE_KEYS]
    return [f"{key} {before[key]} -> {now[key]}" for key in shared if before[key] != now[key]]


def running(
    chain: Chain, stage: str, config: Mapping[str, Any], log: Path, inputs: Mapping[str, Any] | None = None
) -> None:
    """Mark the stage as running in this process's job, from `inputs` (default: the attempt before's).

    Raises: EnvironmentProblem when the job has been restarted again and again, and comes no further.
    """
    before = marker(chain, stage)
    newest = checkpoint_files.newest(chain.run_dir(stage).checkpoints)
    begins = newest.name if newest else None
    restarted = before.get("job_id") == env.job_id() and before["restarts"] < env.restarts()
    idle = before["idle"] + 1 if restarted and before["begins"] == begins else 0
    record = {
        "chain": chain.name,
        "stage": stage,
        "status": "running",
        "job_id": env.job_id(),
        "slurm": env.in_slurm(),  # else job_id is the id of a process on host
        "host": socket.gethostname(),
        "step": env.step_id(),
        "restarts": env.restarts(),
        "begins": begins,  # the checkpoint it goes on from
        "idle": idle,  # restarts in a row that began there
        "cause": None,
        "log": str(log),
        "started": now(),
        "ended": None,
        "config": dict(config),
        "inputs": before["inputs"] if inputs is None else inputs,
        "outputs": {},
    }
    run_lock.check(chain.run_dir(stage))
    with files.lock(chain.run_dir(stage).state_lock):
        files.write_json(chain.run_dir(stage).state, record)
    mirror.push(chain.run_dir(stage))
    files.write_text(chain.run_dir(stage).room, " " * ROOM)
    if idle > MAX_IDLE:
        where = f"it has {begins or 'no checkpoint'} to begin from, as each time"
        why = f"; before: {before['cause']}" if before["cause"] else ""
        raise EnvironmentProblem(f"no progress in {idle} restarts of job {env.job_id()}: {where}{why}")


def wait_until_running(chain: Chain, stage: str) -> None:
    """Wait until rank 0 has marked the stage, so that it does not do so after another rank has failed.

    Not for ever: without it only the cause of such a failure would be lost. Not on several machines of a chain with
    a store: they share no directory.
    Raises: EnvironmentProblem when rank 0 has ended meanwhile.
    """
    if chain.store and env.world().size > env.world().local_size:
        return
    end = time.monotonic() + PATIENCE
    while not is_ours(record := marker(chain, stage)) and time.monotonic() < end:
        time.sleep(0.05)
    if is_ours(record) and record["status"] != "running":
        raise EnvironmentProblem(f"rank 0 has ended: {record.get('cause')}")


def is_ours(record: Mapping[str, Any]) -> bool:
    """Whether a marker is of this process's attempt; without Slurm that has an id on its own host only."""
    here = env.in_slurm() or record.get("host") == socket.gethostname()
    attempt = env.in_slurm(), env.job_id(), env.step_id(), env.restarts()
    return here and tuple(record.get(key) for key in ("slurm", "job_id", "step", "restarts")) == attempt


def update(chain: Chain, stage: str, **values: Any) -> None:
    """Change entries of the stage's marker. Raises: EnvironmentProblem if the run is another attempt's by now."""
    run_lock.check(chain.run_dir(stage))
    with files.lock(chain.run_dir(stage).state_lock):  # one rank may fail while another writes what it read before
        files.write_json(chain.run_dir(stage).state, {**marker(chain, stage), **values})


def done(chain: Chain, stage: str, result: Mapping[str, Any]) -> None:
    """Mark the stage as done, with what its program returned, and keep that from being changed or deleted.

    Raises: OSError for a missing output; CheckpointError for one that is not what was saved.
    """
    outputs = {name: fingerprint(Path(path)) for name, path in result["outputs"].items()}
    for output in outputs.values():
        path = Path(output["path"])
        checkpoint_files.verify(path)
        path.chmod(path.stat().st_mode & ~0o222)
    rest = {"epochs": result["epochs"], "metrics": result["metrics"], "ended": now()}
    before = marker(chain, stage)
    update(chain, stage, status="done", outputs=outputs, **rest)
    try:
        mirror.push(chain.run_dir(stage))
    except EnvironmentProblem:  # then it is not done for who asks the bucket, and this directory says the same
        files.write_json(chain.run_dir(stage).state, before)
        raise
    chain.run_dir(stage).room.unlink(missing_ok=True)


def ended(chain: Chain, stage: str, error: BaseException, log: Path) -> None:
    """Mark this job's attempt at the stage as failed, or, for Stopped, as preempted.

    The first rank that ends so writes its cause; the others fail because they lost it.
    """
    record = marker(chain, stage)
    if record["status"] == "running" and is_ours(record):
        finish(chain, stage, error, log)


def finish(chain: Chain, stage: str, error: BaseException, log: Path | str) -> None:
    """Mark the stage as failed with this cause; for Stopped, as preempted."""
    status = "preempted" if isinstance(error, Stopped) else "failed"
    chain.run_dir(stage).room.unlink(missing_ok=True)
    rest = {"cause": one_line(error), "exit_code": exit_code(error), "log": str(log), "ended": now()}
    update(chain, stage, status=status, **rest)


def fingerprint(path: Path) -> dict[str, str]:
    return {"path": str(path), "sha256": ahead.sha256(path)}


def now() -> str:
    """UTC, to the second."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
