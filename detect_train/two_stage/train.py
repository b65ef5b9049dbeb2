"""Train a part of the two-stage detector: the U-Net that proposes regions, then the ResNet that classifies them.

    # one process; one node of 2 GPUs; under Slurm, a task per GPU
    python -m detect_train.two_stage.train --run-dir runs/mine/unet --dataset-root labeled.sqsh --bp backbone.pth
    torchrun --nproc-per-node=2 -m detect_train.two_stage.train --run-dir ... --dataset-root ... --bp ...
    srun python -m detect_train.two_stage.train --run-dir ... --dataset-root ... --bp ...

That is the U-Net. `--config detect_train/two_stage/configs/classify.yaml unet=LAST` trains the second part on its
last checkpoint and leaves the detector, for `python -m evaluate.run`. Both parts run for `iterations.pre` steps, in
which the ResNet keeps the weights of `--bp`, and `iterations.main` in which it learns too; `--test true` runs a few
of each. `--help` lists the short flags; any other key of the configuration is given as `model.side=384`. The same
command again goes on from the newest checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from detect_train.two_stage.config import Config, parse
from utils.errors import cli

if __name__ == "__main__":
    cli(parse)  # --help and a wrong configuration need no torch, whose import takes seconds

import torch
from torch import nn

from detect_train import reading, rounds
from detect_train.train import read_labels
from detect_train.two_stage.classifier import Noise
from detect_train.two_stage.parts import KINDS, REMEDY, Until, architecture, schedule, start
from detect_train.two_stage.validation import Recall, Seldom
from detect_train.validation import Validate
from utils import (
    checkpoint,
    checkpoint_files,
    config,
    dist,
    engine,
    loader,
    mirror_views,
    paths,
    resume,
    saving,
    squashfs,
    timeline,
)
from utils.device import resolve_precision
from utils.engine import LossFn, TrainState


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train one part. Returns outputs `last` (and `best` of the detector), metrics, and the epochs done."""
    cfg = parse(argv)
    run_dir = paths.RunDir.of(cfg.run_dir)
    how: dict[str, Any] = {"workers": cfg.workers, "deterministic": cfg.deterministic}
    with dist.session(cfg.device, run_dir, timeout=cfg.collective_timeout, **how) as device:
        directory = run_dir.checkpoints
        here = mirror_views.brought(cfg, run_dir)
        path, saved, same_round = resume.begin(cfg, run_dir, KINDS[cfg.part], REMEDY, here.resume)
        if path and saved and same_round and cfg.part == "classify":
            saved["best"] = rounds.name_best(saved, path)
        if saved and same_round and saved["step"] >= cfg.planned.total and not saved["batch"]:
            epochs, best, summary = saved["epochs_done"], saved["best"], saved["summary"]
        else:
            state = train(here, run_dir, device, saved, same_round)
            epochs, best, summary = state.epoch, state.best, state.summary
        last = checkpoint_files.newest(directory)
    if cfg.part == "unet":
        return {"outputs": {"last": last}, "metrics": summary, "epochs": epochs}
    outputs = {"last": last, "best": directory / checkpoint_files.BEST}
    return {"outputs": outputs, "metrics": {**summary, "best_AP": best}, "epochs": epochs}


def train(
    cfg: Config,
    run_dir: paths.RunDir,
    device: torch.device,
    saved: Mapping[str, Any] | None,
    same_round: bool,
) -> TrainState:
    """Train to the part's last iteration, from `saved` or from the stages before; a checkpoint after each epoch."""
    precision = resolve_precision(cfg.precision, device)
    tree = squashfs.stage(cfg.data.labeled, paths.staging_root(run_dir), run_dir.archives, cfg.data.stage)
    timeline.done("staging")
    training, validation = read_labels(cfg.data, run_dir, tree)
    timeline.done("labels")
    identity: dict[str, Any] = {
        "architecture": architecture(cfg, len(training.classes)),
        "classes": list(training.classes),
    }
    conditions = checkpoint.conditions(
        cfg,
        data=dist.from_rank_0(lambda: tree.fingerprint),
        device=device,
        precision=precision,
        optim=asdict(cfg.optim),
        iterations=asdict(cfg.planned),
        **({"samples": cfg.model.samples} if cfg.part == "classify" else {}),
    )
    state = start(cfg, identity, saved, same_round, conditions, device)
    batches = Until(len(training), cfg.batch_size, cfg.seed, total=cfg.planned.total, state=state)

    def payload(state: TrainState) -> dict[str, Any]:
        return checkpoint.payload(
            KINDS[cfg.part], state=state, config=config.to_dict(cfg), conditions=conditions, **identity
        )

    def files_of(epoch: int, batch: int) -> list[str]:
        return [training.shown(index) for index in batches.indices(epoch, batch)]

    reader = reading.of(state.model)
    images = loader.Seeded(reader.examples(training, flip=True), cfg.seed)
    metrics, save = saving.standard(run_dir, state, cfg, payload, files_of)
    how: dict[str, Any] = {"workers": cfg.workers, "device": device, "precision": precision}
    measure = Recall if cfg.part == "unet" else Validate
    validate = measure(validation, metrics.writer, save, batch_size=cfg.batch_size // dist.size(), **how)
    model = dist.parallel(state.model, device)

    def seed() -> int:
        return loader.seed_from(cfg.seed, state.step, dist.rank())

    engine.fit(
        state,
        loader.make(images, batches, collate=reader.collate(training), workers=cfg.workers, device=device),
        unet_loss(model, device) if cfg.part == "unet" else classifier_loss(model, cfg.model.proposals, seed, device),
        [metrics, Seldom(validate, cfg.validate_every, batches.epochs), save],
        epochs=batches.epochs,
        schedule=schedule(cfg.optim.lr, cfg.optim.warmup_steps, cfg.planned),
        seed=cfg.seed,
        device=device,
        precision=precision,
    )
    return state


def unet_loss(unet: nn.Module, device: torch.device) -> LossFn:
    """The three losses of a batch's maps."""
    return lambda batch: (unet(*batch.to(device)), {})


def classifier_loss(detector: nn.Module, proposals: int, seed: Callable[[], int], device: torch.device) -> LossFn:
    """The two losses of a batch's crops. Args: seed: of the step."""
    return lambda batch: (detector(*batch.to(device), Noise.draw(batch.targets, proposals, seed()).to(device)), {})


if __name__ == "__main__":
    cli(main)
