"""Checkpoints: their keys, how they are written and read. Their names are in `checkpoint_files`.

One file is enough to go on or to evaluate. It holds tensors, numbers, strings, lists and dicts only, so
`torch.load(weights_only=True)` reads it, and that is the only way anything is read here. No generator states:
a step's random numbers follow from (seed, step, rank), an item's from (seed, epoch, index).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torchvision

from utils import checkpoint_files, dist, files, log, run_lock, timeline
from utils.checkpoint_files import BEST
from utils.device import kind_of, on_host
from utils.errors import InputError
from utils.paths import RunDir
from utils.shared_config import Training

FORMAT = "relay-2"


def conditions(cfg: Training, *, data: str, device: torch.device, precision: str, **own: Any) -> dict[str, Any]:
    """What the bits of a run depend on besides the code and where it starts.

    Args:
        data: fingerprint of the training data.
        own: what the program adds, such as the learning rate.
    """
    timeline.done("staging", "data")  # it is there: `data` is its fingerprint
    return {
        "world_size": dist.size(),
        "batch_size": cfg.batch_size,
        "seed": cfg.seed,
        "data": data,
        "device": kind_of(device),
        "threads": torch.get_num_threads(),
        "precision": precision,
        "deterministic": cfg.deterministic,
        "torch": str(torch.__version__),
        "torchvision": str(torchvision.__version__),
        **own,
    }


def payload(
    kind: str,
    *,
    state: Any,
    architecture: Mapping[str, Any],
    config: Mapping[str, Any],
    conditions: Mapping[str, Any],
    **extra: Any,
) -> dict[str, Any]:
    """What a checkpoint holds.

    Args:
        kind: what the weights are, `moco` or `detector`; see `load`.
        state: the engine's TrainState.
        architecture: everything needed to build the model again.
        extra: what one kind has besides (a detector its classes).
    """
    return {
        "format": FORMAT,
        "kind": kind,
        "epochs_done": state.epoch,
        "batch": state.batch,
        "step": state.step,
        "start_step": state.start_step,
        "best": state.best,
        "is_best": state.is_best and not state.batch,
        "rows": list(state.rows),
        "summary": dict(state.summary),
        "resumes": state.resumes,
        "inexact": list(state.inexact),
        "model": state.model.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "architecture": dict(architecture),
        "config": dict(config),
        "conditions": dict(conditions),
        **extra,
    }


def file_name(content: Mapping[str, Any]) -> str:
    """The name of a checkpoint in its run's directory."""
    epoch, step = content["epochs_done"], content["step"]
    return checkpoint_files.name(epoch, step) if content["batch"] else checkpoint_files.name(epoch - 1)


def save(run_dir: RunDir, content: Mapping[str, Any]) -> Path:
    """Write a checkpoint atomically, its hash beside it; keep the newest two and, as `best.pth`, the best.

    Raises: EnvironmentProblem when the disk is full or read-only, or the run is another attempt's by now; what was
    there before is whole then.
    """
    path = run_dir.checkpoints / file_name(content)

    def before_rename(digest: str) -> None:
        run_lock.check(run_dir)
        checkpoint_files.record(path, digest)

    files.write_atomic(path, lambda file: torch.save(on_host(dict(content)), file), before_rename)
    if content["is_best"]:
        adopt(path, run_dir.checkpoints / BEST)
    checkpoint_files.prune(run_dir.checkpoints)
    return path


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Write one weights file atomically."""
    files.write_atomic(path, lambda file: torch.save(dict(content), file))


def adopt(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`, atomically, with its hash: a link, or a copy between file systems."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)
    digest = checkpoint_files.known(source) or files.sha256(source)
    checkpoint_files.record(target, digest)
    os.replace(temporary, target)


def load(path: Path, kind: str, remedy: str) -> dict[str, Any]:
    """A checkpoint of ours, on the CPU.

    Raises: InputError when it is not one, or holds another kind than `kind` (then `remedy` says what to do).
    """
    content = read(path)
    if content.get("format") != FORMAT:
        raise InputError(f"{path}: not a checkpoint of this project (format {content.get('format')!r}); {remedy}")
    if missing := {"kind", "model", "epochs_done", "step"} - content.keys():
        raise InputError(f"{path}: incomplete, without {', '.join(sorted(missing))}; {remedy}")
    if content["kind"] != kind:
        raise InputError(f"{path}: a {content['kind']} checkpoint, not a {kind}; {remedy}")
    timeline.done("start-up", "checkpoint")
    log.info(f"{path}: {kind} after {content['epochs_done']} epochs, {content['step']} steps")
    return content


def check(path: Path) -> None:
    """Raise CheckpointError, on every rank, if rank 0 finds that a file is not what its hash beside it says."""
    dist.from_rank_0(lambda: str(checkpoint_files.verify(path)))


def read(path: Path) -> dict[str, Any]:
    """Any torch file that holds a dict, on the CPU; refuses whatever could run code. Raises: InputError."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except Exception as error:  # whatever torch's unpickler stumbles over in a damaged or hostile file
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(f"{path}: not a readable weights file: {reason}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a {type(content).__name__}, not a state dict")
    return content
