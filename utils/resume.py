"""Where a run starts from, and how it goes on exactly there."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from utils import checkpoint, checkpoint_files, config, dist, env, files, log, metrics_csv, paths
from utils.errors import CheckpointError, InputError


def begin(
    cfg: Any, run_dir: paths.RunDir, kind: str, remedy: str, named: str, init: str | None = None
) -> tuple[Path | None, dict[str, Any] | None, bool]:
    """Where a run begins, see `starting_point`; its directory is made ready for it, with the configuration in it.

    Args:
        cfg: dataclass of the program's configuration.
        kind, remedy: of the checkpoint, see `checkpoint.load`.
        named, init: `resume` and the round before, in local files.

    Returns: the checkpoint's path, the checkpoint, and whether it belongs to this same round.
    """
    path, same_round = starting_point(named, init, run_dir.checkpoints, env.restarts())
    saved = checkpoint.load(path, kind, remedy) if path else None
    if dist.rank() == 0:
        make_room(run_dir.checkpoints, saved if same_round else None)
        files.write_text(run_dir.config, config.to_yaml(cfg))
        metrics_csv.write_settings(run_dir, cfg)
    return path, saved, same_round


def starting_point(resume: str, init: str | None, directory: Path, restarts: int) -> tuple[Path | None, bool]:
    """(the checkpoint to start from or None, whether it belongs to this same round), the same on all ranks.

    `auto`: this run's newest that is whole, else the round before (`init`). `never`: only `init`. A path: that file.
    Once the job was requeued, this run's newest is further than any of them.

    Raises: InputError when a named file is missing, CheckpointError when it is damaged, or all of this run's are.
    """

    def choose() -> str:
        path, same_round = _starting_point(resume, init, directory, restarts)
        return f"{int(same_round)}{path or ''}"

    agreed = dist.from_rank_0(choose)  # file systems may show nodes different listings
    return Path(agreed[1:]) if agreed[1:] else None, agreed[0] == "1"


def _starting_point(resume: str, init: str | None, directory: Path, restarts: int) -> tuple[Path | None, bool]:
    own = newest_whole(directory) if resume == "auto" or restarts else None
    if own:
        return own, True
    named = resume if resume not in ("auto", "never") else init
    if named is None:
        return None, False
    if not Path(named).is_file():
        raise InputError(f"checkpoint {named}: no such file")
    checkpoint_files.verify(Path(named))
    return Path(named), Path(named).resolve().parent == directory.resolve()


def newest_whole(directory: Path) -> Path | None:
    """The newest checkpoint that is as it was saved. Raises: CheckpointError when there are some and none is."""
    damaged = []
    for path in reversed(checkpoint_files.everything(directory)):
        try:
            if not checkpoint_files.verify(path):
                checkpoint.read(path)
        except (CheckpointError, InputError) as error:
            log.warning(str(error))
            damaged.append(path.name)
            continue
        if damaged:
            log.warning(f"going on from the one before: {path}")
        return path
    if damaged:
        listed = ", ".join(damaged)
        raise CheckpointError(f"{directory}: all checkpoints are damaged ({listed}); move them away to start anew")
    return None


def make_room(directory: Path, start: Mapping[str, Any] | None) -> None:
    """Set aside the checkpoints further than `start`, a checkpoint of this run, or all without one.

    They are damaged, or another history's. Left there, they would be the newest for retention and the next resume.
    """
    reached = checkpoint_files.position(checkpoint.file_name(start)) if start else (-1, 0.0)
    later = [path for path in checkpoint_files.everything(directory) if checkpoint_files.position(path.name) > reached]
    if not later:
        return
    best = directory / checkpoint_files.BEST
    if best.exists() and _position_of(best) > reached:
        later.append(best)
    aside = paths.free_name(directory)
    aside.mkdir()
    for path in later:
        for file in filter(Path.exists, (path, checkpoint_files.sidecar(path))):
            file.rename(aside / file.name)
    log.info(f"checkpoints that are further than where this run starts are now in {aside}")


def _position_of(path: Path) -> tuple[float, float]:
    """Where in the run a checkpoint of any name was saved; a damaged one counts as further than all."""
    try:
        checkpoint_files.verify(path)
        return checkpoint_files.position(checkpoint.file_name(checkpoint.read(path)))
    except (CheckpointError, InputError):
        return math.inf, 0


def restore(
    state: Any, saved: Mapping[str, Any], *, same_round: bool, conditions: Mapping[str, Any], allow_world_change: bool
) -> None:
    """Put a checkpoint's weights, optimizer state and counters into the engine's TrainState.

    The optimizer keeps this run's hyperparameters (momentum, weight decay, ...): the stored ones are the saving run's.
    In a new round (`same_round=False`) the counters go on, and the round starts with an epoch at the step they show.

    Raises: InputError when the same round cannot go on under other `conditions`; what only costs exactness is
    noted in `state.inexact`.
    """
    state.inexact = list(saved["inexact"])
    if saved["batch"] and not same_round:
        where = f"{saved['batch']} batches into epoch {saved['epochs_done']}"
        raise InputError(f"the checkpoint was saved {where}: go on in its own run directory, or give a whole epoch's")
    if same_round:
        state.inexact += _changes(saved, conditions, allow_world_change)
        state.batch, state.rows, state.is_best = saved["batch"], list(saved["rows"]), saved["is_best"]
    state.model.load_state_dict(saved["model"])
    own = [
        {key: value for key, value in group.items() if key not in ("params", "lr")}
        for group in state.optimizer.param_groups
    ]
    state.optimizer.load_state_dict(saved["optimizer"])
    for group, settings in zip(state.optimizer.param_groups, own, strict=True):
        group.update(settings)
    state.epoch, state.step, state.best = saved["epochs_done"], saved["step"], saved["best"]
    state.summary = dict(saved["summary"])
    state.start_step = saved["start_step"] if same_round else saved["step"]
    state.resumes = saved["resumes"] + int(same_round)


def _changes(saved: Mapping[str, Any], now: Mapping[str, Any], allow_world_change: bool) -> list[str]:
    before = saved["conditions"]
    changed = {key: f"{key} {before.get(key)} -> {now[key]}" for key in now if before.get(key) != now[key]}
    if "world_size" in changed and not allow_world_change:
        raise InputError(
            f"the checkpoint is of {before['world_size']} ranks, this run has {now['world_size']}: start as many, or "
            "set allow_world_change=true to go on with the same batches, though not with the same last digits"
        )
    if torn := [text for key, text in changed.items() if key in ("batch_size", "seed", "data") and saved["batch"]]:
        where = f"{saved['batch']} batches into epoch {saved['epochs_done']}"
        raise InputError(f"the checkpoint was saved {where}, where these must stay: {'; '.join(torn)}")
    notes = [f"after step {saved['step']}: {text}" for text in changed.values()]
    for note in notes:
        log.warning(f"not exactly as without the interruption: {note}")
    return notes
