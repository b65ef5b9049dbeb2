"""MoCo-v2 pretraining on unlabelled images; at the end the query encoder is exported as backbone.pth.

    python -m ssl_train.train --run-dir runs/mine/pretrain --dataset-root unlabeled.sqsh  # one process
    torchrun --nproc-per-node=4 -m ssl_train.train --run-dir ... --dataset-root ...       # one node, 4 GPUs
    srun python -m ssl_train.train --run-dir ... --dataset-root ...                       # a task per GPU

`--config ssl_train/configs/demo.yaml` is the small one. `--help` lists the short flags; any other key of the
configuration is given as `model.queue=16384`. The same command again goes on from the newest checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from ssl_train.config import Config, parse
from ssl_train.data import UnlabeledImages, random_view
from ssl_train.export import export
from ssl_train.model import MoCo, accuracy
from utils import checkpoint, config, dist, engine, env, files, hooks, loader, optim, paths, squashfs
from utils.device import resolve_precision
from utils.engine import LossFn, Scalars, TrainState
from utils.errors import InputError, cli
from utils.metrics import MetricsWriter


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Pretrain. Returns outputs `last` and `backbone`, metrics of the last epoch, and the epochs done."""
    cfg = parse(argv)
    run_dir = paths.RunDir(Path(cfg.run_dir))
    with dist.session(cfg.device, run_dir, cfg.workers) as device:
        if dist.rank() == 0:
            files.write_text(run_dir.config, config.to_yaml(cfg))
        state, last = start(cfg, run_dir, device)
        if state.epoch < cfg.epochs:
            fit(state, cfg, run_dir, device)
            last = checkpoint.newest(run_dir.checkpoints)
        assert last is not None
        if dist.rank() == 0:
            export(last, run_dir.backbone)
        dist.barrier()
    return {
        "outputs": {"last": last, "backbone": run_dir.backbone},
        "metrics": {name: state.summary[f"{name}_avg"] for name in ("loss", "top1", "top5")},
        "epochs": state.epoch,
    }


def start(cfg: Config, run_dir: paths.RunDir, device: torch.device) -> tuple[TrainState, Path | None]:
    """The model and its optimizer, new or as the checkpoint that is returned too left them."""
    torch.manual_seed(cfg.seed)  # the same first weights and queue on every rank
    model = MoCo(**asdict(cfg.model)).to(device)
    state = TrainState(model, optim.sgd(model, **asdict(cfg.optim)))
    path, same_round = checkpoint.starting_point(cfg.resume, None, run_dir.checkpoints, env.restarts())
    if path:
        saved = checkpoint.load(path, "moco", "give a checkpoint of ssl_train.train")
        if saved["architecture"] != asdict(cfg.model):
            raise InputError(f"{path}: its model is {saved['architecture']}, this run's {asdict(cfg.model)}")
        checkpoint.restore(state, saved, same_round=same_round)
    if dist.rank() == 0:
        checkpoint.make_room(run_dir.checkpoints, state.epoch if same_round else 0)
    return state, path


def fit(state: TrainState, cfg: Config, run_dir: paths.RunDir, device: torch.device) -> None:
    """Train to the last epoch, with a checkpoint after each."""

    def payload(state: TrainState) -> dict[str, Any]:
        return checkpoint.payload(
            "moco",
            state=state,
            architecture=asdict(cfg.model),
            config=config.to_dict(cfg),
            world_size=dist.size(),
        )

    writer = MetricsWriter(run_dir.metrics, state.step)
    engine.fit(
        state,
        make_loader(cfg, run_dir, device),
        contrastive_loss(dist.parallel(state.model, device), device),
        [
            hooks.LogMetrics(writer, every=cfg.log_every, batch_size=cfg.batch_size),
            hooks.SaveCheckpoints(run_dir.checkpoints, payload),
        ],
        epochs=cfg.epochs,
        schedule=optim.cosine(cfg.optim.lr, cfg.epochs),
        seed=cfg.seed,
        device=device,
        precision=resolve_precision(cfg.precision, device),
    )


def make_loader(cfg: Config, run_dir: paths.RunDir, device: torch.device) -> DataLoader[Any]:
    """Batches of (query views, key views), each (n, 3, h, w) on the CPU."""
    root = squashfs.stage(cfg.data.unlabeled, paths.staging_root(run_dir))
    images = UnlabeledImages(root, random_view(**asdict(cfg.augment)))
    batches = loader.GlobalBatches(len(images), cfg.batch_size, cfg.seed)
    return loader.make(loader.Seeded(images, cfg.seed), batches, workers=cfg.workers, device=device)


def contrastive_loss(moco: nn.Module, device: torch.device) -> LossFn:
    """InfoNCE of a batch of (query views, key views), with the (K + 1)-way accuracy in percent."""

    def loss_fn(batch: Sequence[torch.Tensor]) -> tuple[Scalars, Scalars]:
        query_images, key_images = (views.to(device, non_blocking=True) for views in batch)
        logits, labels = moco(query_images, key_images)
        return {"loss": F.cross_entropy(logits, labels)}, accuracy(logits)

    return loss_fn


if __name__ == "__main__":
    cli(main)
