"""MoCo-v2 pretraining on unlabelled images; at the end the query encoder is exported as backbone.pth.

    python -m ssl_train.train --run-dir runs/mine/pretrain --dataset-root unlabeled.sqsh  # one process
    torchrun --nproc-per-node=4 -m ssl_train.train --run-dir ... --dataset-root ...       # one node, 4 GPUs
    srun python -m ssl_train.train --run-dir ... --dataset-root ...                       # a task per GPU

`--config ssl_train/configs/demo.yaml` is the small one. `--help` lists the short flags; any other key of the
configuration is given as `model.queue=16384`. The same command again goes on from the newest checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ssl_train.config import QUICK, Config, parse
from utils.errors import cli

if __name__ == "__main__":
    cli(parse)  # --help and a wrong configuration need no torch, whose import takes seconds

import torch
from torch import nn
from torch.nn import functional as F

from ssl_train.batches import ShuffledBatches
from ssl_train.data import Batch, Views, to_device
from ssl_train.export import REMEDY, export
from ssl_train.model import accuracy
from ssl_train.pictures import ShowViews
from ssl_train.start import all_or_none, architecture, start
from utils import (
    checkpoint,
    checkpoint_files,
    config,
    dist,
    engine,
    image_cache,
    loader,
    mirror_views,
    optim,
    paths,
    resume,
    saving,
    squashfs,
)
from utils.device import resolve_precision
from utils.engine import LossFn, Scalars, TrainState


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Pretrain. Returns outputs `last` and `backbone`, metrics of the last epoch, and the epochs done."""
    cfg = parse(argv)
    run_dir = paths.RunDir.of(cfg.run_dir)
    how: dict[str, Any] = {"workers": cfg.workers, "deterministic": cfg.deterministic}
    with dist.session(cfg.device, run_dir, timeout=cfg.collective_timeout, **how) as device:
        here = mirror_views.brought(cfg, run_dir)
        _, saved, same_round = resume.begin(cfg, run_dir, "moco", REMEDY, here.resume)
        if saved and same_round and saved["epochs_done"] >= cfg.epochs:
            epochs, summary = saved["epochs_done"], saved["summary"]
        else:
            state = train(cfg, run_dir, device, saved, same_round)
            epochs, summary = state.epoch, state.summary
        last = checkpoint_files.newest(run_dir.checkpoints)
        assert last is not None
        if dist.rank() == 0:
            export(last, run_dir.backbone)
        dist.barrier()
    return {
        "outputs": {"last": last, "backbone": run_dir.backbone},
        "metrics": {name: summary[f"{name}_avg"] for name in ("loss", "top1", "top5")},
        "epochs": epochs,
    }


def train(
    cfg: Config,
    run_dir: paths.RunDir,
    device: torch.device,
    saved: Mapping[str, Any] | None,
    same_round: bool,
) -> TrainState:
    """Train to the last epoch, from `saved` or from random weights."""
    precision = resolve_precision(cfg.precision, device)
    tree = squashfs.stage(cfg.data.unlabeled, paths.staging_root(run_dir), run_dir.archives, cfg.data.stage)
    images = all_or_none(lambda: image_cache.of(tree, cfg.data.cache, cfg.workers))
    views = Views(images, seed=cfg.seed, **asdict(cfg.augment))
    count = min(len(images), QUICK * cfg.batch_size) if cfg.quick else len(images)
    batches = ShuffledBatches(count, cfg.batch_size, cfg.seed, cfg.model.bn_groups)
    conditions = checkpoint.conditions(
        cfg,
        data=dist.from_rank_0(lambda: tree.fingerprint),
        device=device,
        precision=precision,
        optim=asdict(cfg.optim),
        augment=asdict(cfg.augment),
        epochs=cfg.epochs,
        bn_groups=cfg.model.bn_groups,
        device_crops=cfg.augment.backend == "device" and cfg.data.cache is not None,
    )
    state = start(cfg, device, saved, same_round, conditions)

    def payload(state: TrainState) -> dict[str, Any]:
        return checkpoint.payload(
            "moco",
            state=state,
            architecture=architecture(cfg),
            config=config.to_dict(cfg),
            conditions=conditions,
        )

    def files_of(epoch: int, batch: int) -> list[str]:
        return [images.shown(index) for index in batches.indices(epoch, batch)]

    metrics, save = saving.standard(run_dir, state, cfg, payload, files_of)
    engine.fit(
        state,
        loader.make(views, batches, workers=cfg.workers, device=device, collate=loader.whole),
        contrastive_loss(dist.parallel(state.model, device), device),
        [ShowViews(views, batches, metrics.writer), metrics, save],
        epochs=cfg.epochs,
        schedule=optim.cosine(cfg.optim.lr, cfg.epochs),
        seed=cfg.seed,
        device=device,
        precision=precision,
    )
    return state


def contrastive_loss(moco: nn.Module, device: torch.device) -> LossFn:
    """InfoNCE of a batch of views, with the (K + 1)-way accuracy in percent."""

    def loss_fn(batch: Batch) -> tuple[Scalars, Scalars]:
        query_images, key_images = to_device(batch, device)
        logits, labels = moco(query_images, key_images, batch.order.to(device, non_blocking=True))
        return {"loss": F.cross_entropy(logits, labels)}, accuracy(logits)

    return loss_fn


if __name__ == "__main__":
    cli(main)
