"""Train a detector for one round: from a backbone, or from where the round before ended.

    # one process; one node of 2 GPUs; under Slurm, a task per GPU
    python -m detect_train.train --run-dir runs/mine/r1 --dataset-root labeled.sqsh --bp backbone.pth
    torchrun --nproc-per-node=2 -m detect_train.train --run-dir ... --dataset-root ... --bp ...
    srun python -m detect_train.train --run-dir ... --dataset-root ... --bp ...

A round is a configuration: `--config detect_train/configs/r2.yaml init=LAST best=BEST` goes on from r1's last
checkpoint at a tenth of its learning rate, with its optimizer state and its count of epochs. Epochs and batch
size are totals: of all rounds, and of all ranks. `--help` lists the short flags; any other key of the
configuration is given as `model.norm=sync`. The same command again goes on from the newest checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from detect_train.config import Config, Data, parse
from utils.errors import InputError, cli

if __name__ == "__main__":
    cli(parse)  # --help and a wrong configuration need no torch, whose import takes seconds

import torch
from torch import nn

from detect_train import reading, rounds
from detect_train.validation import Validate
from utils import (
    checkpoint,
    checkpoint_files,
    config,
    dist,
    engine,
    labels,
    loader,
    mirror_views,
    optim,
    paths,
    resume,
    saving,
    squashfs,
    timeline,
)
from utils.device import resolve_precision
from utils.engine import LossFn, TrainState
from utils.labels import LabelIndex
from utils.tree import Tree


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train one round. Returns outputs `last` and `best`, metrics of the last epoch, and the epochs done."""
    cfg = parse(argv)
    run_dir = paths.RunDir.of(cfg.run_dir)
    how: dict[str, Any] = {"workers": cfg.workers, "deterministic": cfg.deterministic}
    with dist.session(cfg.device, run_dir, timeout=cfg.collective_timeout, **how) as device:
        directory = run_dir.checkpoints
        here = mirror_views.brought(cfg, run_dir)
        path, saved, same_round = resume.begin(cfg, run_dir, "detector", rounds.REMEDY, here.resume, here.init)
        if path and saved and same_round:
            saved["best"] = rounds.name_best(saved, path)
        if saved and same_round and saved["epochs_done"] >= cfg.epochs:
            epochs, best, summary = saved["epochs_done"], saved["best"], saved["summary"]
        else:
            state = train(here, run_dir, device, saved, same_round)
            epochs, best, summary = state.epoch, state.best, state.summary
        last = checkpoint_files.newest(directory)
    return {
        "outputs": {"last": last, "best": directory / checkpoint_files.BEST},
        "metrics": {**summary, "best_AP": best},
        "epochs": epochs,
    }


def train(
    cfg: Config,
    run_dir: paths.RunDir,
    device: torch.device,
    saved: Mapping[str, Any] | None,
    same_round: bool,
) -> TrainState:
    """Train to the round's last epoch from `saved`, or from a backbone; a checkpoint after each epoch."""
    if cfg.model.norm == "sync" and device.type != "cuda" and dist.size() > 1:
        raise InputError(f"model.norm=sync: on {device.type} only with one rank; set model.norm=frozen or train")
    precision = resolve_precision(cfg.precision, device)
    tree = squashfs.stage(cfg.data.labeled, paths.staging_root(run_dir), run_dir.archives, cfg.data.stage)
    timeline.done("staging")
    training, validation = read_labels(cfg.data, run_dir, tree)
    timeline.done("labels")
    batches = loader.GlobalBatches(len(training), cfg.batch_size, cfg.seed)
    identity: dict[str, Any] = {
        "architecture": {"num_classes": 1 + len(training.classes), **cfg.model.architecture()},
        "classes": list(training.classes),
    }
    conditions = checkpoint.conditions(
        cfg,
        data=dist.from_rank_0(lambda: tree.fingerprint),
        device=device,
        precision=precision,
        optim=asdict(cfg.optim),
    )
    state = rounds.start(cfg, identity, saved, same_round, conditions, device)
    if not same_round:
        rounds.adopt_best(cfg, identity, state, run_dir.checkpoints)

    def payload(state: TrainState) -> dict[str, Any]:
        return checkpoint.payload(
            "detector", state=state, config=config.to_dict(cfg), conditions=conditions, **identity
        )

    def files_of(epoch: int, batch: int) -> list[str]:
        return [training.shown(index) for index in batches.indices(epoch, batch)]

    reader = reading.of(state.model)
    images = loader.Seeded(reader.examples(training, flip=True), cfg.seed)
    metrics, save = saving.standard(run_dir, state, cfg, payload, files_of)
    how: dict[str, Any] = {"workers": cfg.workers, "device": device, "precision": precision}
    engine.fit(
        state,
        loader.make(images, batches, collate=reader.collate(training), workers=cfg.workers, device=device),
        detection_loss(dist.parallel(state.model, device), device),
        [metrics, Validate(validation, metrics.writer, save, batch_size=cfg.batch_size // dist.size(), **how), save],
        epochs=cfg.epochs,
        schedule=optim.constant(cfg.optim.lr, cfg.optim.warmup_steps, state.start_step),
        seed=cfg.seed,
        device=device,
        precision=precision,
    )
    return state


def read_labels(data: Data, run_dir: paths.RunDir, tree: Tree) -> list[LabelIndex]:
    """The training and the validation split, both checked before anything is trained."""
    classes = labels.read_classes(data.classes) if data.classes else None
    caches = {split: run_dir.label_index(split) for split in ("training", "validation")}
    indexes = labels.load_splits(tree, caches, classes=classes, on_error=data.on_error)
    for index in indexes:
        if not len(index.labels):
            raise InputError(f"{tree}: no box in the {index.split} split")
    return indexes


def detection_loss(detector: nn.Module, device: torch.device) -> LossFn:
    """The detector's losses of a batch."""
    return lambda batch: (detector(*batch.to(device)), {})


if __name__ == "__main__":
    cli(main)
