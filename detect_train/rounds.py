"""Where a round begins: a backbone, this round's own checkpoint, or the end of the round before."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from reprlib import repr as brief
from typing import Any

import torch

from detect_train.backbone import load_backbone
from detect_train.config import Config
from detect_train.model import build
from utils import checkpoint, checkpoint_files, dist, log, optim, resume
from utils.device import place
from utils.engine import TrainState
from utils.errors import InputError

Identity = Mapping[str, Any]  # what its weights mean, as in a checkpoint: `architecture` and `classes`
REMEDY = "give a checkpoint of detect_train; backbone weights go to --bp"
# What a round may change of the architecture: nothing in the weights depends on it.
FREE = {
    "min_size",
    "max_size",
    "proposals_train",
    "proposals_test",
    "box_batch_size",
    "score_threshold",
    "detections_per_image",
    "samples",
    "overlap",
}


def start(
    cfg: Config,
    identity: Identity,
    saved: Mapping[str, Any] | None,
    same_round: bool,
    conditions: Mapping[str, Any],
    device: torch.device,
) -> TrainState:
    """The model and its optimizer as `saved` left them, or new with the backbone's weights.

    Args:
        saved: the checkpoint to go on from; of the round before unless `same_round`.

    Raises: InputError when the checkpoint's are others, or its epochs are all there is to train.
    """
    torch.manual_seed(cfg.seed)  # the same first weights on every rank
    model = build(**identity["architecture"])
    if saved is None and cfg.backbone:
        load_backbone(model, Path(cfg.backbone))
    model.to(device)
    if conditions["precision"] == "bf16":  # as `Transform` gives images; before momenta are loaded, which follow it
        place(model, device)
    sgd = optim.sgd(model, lr=cfg.optim.lr, momentum=cfg.optim.momentum, weight_decay=cfg.optim.weight_decay)
    state = TrainState(model, sgd)
    if saved:
        check_same(identity, saved)
        world = cfg.allow_world_change
        resume.restore(state, saved, same_round=same_round, conditions=conditions, allow_world_change=world)
        if state.epoch >= cfg.epochs:
            raise InputError(f"epochs={cfg.epochs}: the {state.epoch} of the rounds before count too; give more")
        log.info(f"{'going on' if same_round else 'a new round'} after {state.epoch} epochs, {state.step} steps")
    return state


def adopt_best(cfg: Config, identity: Identity, state: TrainState, directory: Path) -> None:
    """Begin a new round with the best checkpoint so far, if given; without it the best is this round's own."""
    state.best = None
    if cfg.best:
        checkpoint.check(Path(cfg.best))
        best = checkpoint.load(Path(cfg.best), "detector", REMEDY)
        check_same(identity, best)
        state.best = best["best"]
        if dist.rank() == 0:
            checkpoint.adopt(Path(cfg.best), directory / checkpoint_files.BEST)


def name_best(saved: Mapping[str, Any], path: Path) -> float | None:
    """The best AP so far of a round that goes on from `path`; None if the best was lost, so that another becomes it.

    A save may have been killed between writing the best checkpoint and naming it so: that is done now.
    """

    def has_best() -> str:
        best = path.with_name(checkpoint_files.BEST)
        if saved["is_best"]:
            checkpoint.adopt(path, best)
        return "yes" if best.exists() else ""

    return saved["best"] if dist.from_rank_0(has_best) else None


def check_same(identity: Identity, saved: Mapping[str, Any]) -> None:
    """Raises: InputError when a checkpoint's weights mean something else than this run's."""
    ours = {**identity["architecture"], "classes": identity["classes"]}
    theirs = {"head": "rcnn", **saved["architecture"], "classes": saved["classes"]}  # old ones do not name it
    if differing := [key for key in ours if key not in FREE and ours[key] != theirs.get(key)]:
        values = "; ".join(f"{key} {brief(theirs.get(key))} there, {brief(ours[key])} here" for key in differing)
        raise InputError(f"the checkpoint is of another detector: {values}")
