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
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ssl_train.config import Config, parse
from ssl_train.data import UnlabeledImages, random_view
from ssl_train.export import export
from ssl_train.model import MoCo, accuracy
from utils import (
    checkpoint,
    checkpoint_files,
    config,
    dist,
    engine,
    env,
    files,
    hooks,
    loader,
    optim,
    paths,
    resume,
    squashfs,
)
from utils.device import resolve_precision
from utils.engine import LossFn, Scalars, TrainState
from utils.errors import InputError, cli


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Pretrain. Returns outputs `last` and `backbone`, metrics of the last epoch, and the epochs done."""
    cfg = parse(argv)
    run_dir = paths.RunDir(Path(cfg.run_dir))
    how: dict[str, Any] = {"workers": cfg.workers, "deterministic": cfg.deterministic}
    with dist.session(cfg.device, run_dir, timeout=cfg.collective_timeout, **how) as device:
        path, same_round = resume.starting_point(cfg.resume, None, run_dir.checkpoints, env.restarts())
        saved = checkpoint.load(path, "moco", "give a checkpoint of ssl_train.train") if path else None
        if dist.rank() == 0:
            resume.make_room(run_dir.checkpoints, saved if same_round else None)
        if dist.rank() == 0:
            files.write_text(run_dir.config, config.to_yaml(cfg))
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
    archive = squashfs.stage(cfg.data.unlabeled, paths.staging_root(run_dir), run_dir.archives)
    images = UnlabeledImages(archive, random_view(**asdict(cfg.augment)))
    batches = loader.GlobalBatches(len(images), cfg.batch_size, cfg.seed)
    conditions = checkpoint.conditions(
        cfg,
        data=dist.from_rank_0(lambda: squashfs.fingerprint(archive)),
        device=device,
        precision=precision,
        **{"optim": asdict(cfg.optim), "augment": asdict(cfg.augment), "epochs": cfg.epochs},
    )
    state = start(cfg, device, saved, same_round, conditions)

    def payload(state: TrainState) -> dict[str, Any]:
        return checkpoint.payload(
            "moco",
            state=state,
            architecture=asdict(cfg.model),
            config=config.to_dict(cfg),
            conditions=conditions,
        )

    def files_of(epoch: int, batch: int) -> list[Path]:
        return [images.files[index] for index in batches.indices(epoch, batch)]

    engine.fit(
        state,
        loader.make(loader.Seeded(images, cfg.seed), batches, workers=cfg.workers, device=device),
        contrastive_loss(dist.parallel(state.model, device), device),
        hooks.standard(run_dir, state, cfg, payload, files_of),
        epochs=cfg.epochs,
        schedule=optim.cosine(cfg.optim.lr, cfg.epochs),
        seed=cfg.seed,
        device=device,
        precision=precision,
    )
    return state


def start(
    cfg: Config,
    device: torch.device,
    saved: Mapping[str, Any] | None,
    same_round: bool,
    conditions: Mapping[str, Any],
) -> TrainState:
    """The model and its optimizer, new or as `saved` left them. Raises: InputError when that is of another model."""
    torch.manual_seed(cfg.seed)  # the same first weights and queue on every rank
    model = MoCo(**asdict(cfg.model)).to(device)
    state = TrainState(model, optim.sgd(model, **asdict(cfg.optim)))
    if saved:
        if saved["architecture"] != asdict(cfg.model):
            raise InputError(f"the checkpoint's model is {saved['architecture']}, this run's {asdict(cfg.model)}")
        if saved["epochs_done"] >= cfg.epochs:
            raise InputError(f"epochs={cfg.epochs}: the checkpoint's {saved['epochs_done']} count too; give more")
        resume.restore(
            state,
            saved,
            same_round=same_round,
            conditions=conditions,
            allow_world_change=cfg.allow_world_change,
        )
    return state


def contrastive_loss(moco: nn.Module, device: torch.device) -> LossFn:
    """InfoNCE of a batch of (query views, key views), with the (K + 1)-way accuracy in percent."""

    def loss_fn(batch: Sequence[torch.Tensor]) -> tuple[Scalars, Scalars]:
        query_images, key_images = (views.to(device, non_blocking=True) for views in batch)
        logits, labels = moco(query_images, key_images)
        return {"loss": F.cross_entropy(logits, labels)}, accuracy(logits)

    return loss_fn


if __name__ == "__main__":
    cli(main)
