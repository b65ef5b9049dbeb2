"""Evaluate a detection checkpoint on one split of a labelled set, by COCO's rules.

One process     python -m evaluate.run --checkpoint-path best.pth --dataset-root labeled.sqsh --run-dir DIR
Several         torchrun --nproc-per-node 4 -m evaluate.run ...
Slurm           srun python -m evaluate.run ...     (slurm/eval_mocov2_fpn.slurm does it)

The checkpoint alone is enough: classes, architecture and image sizes are in it. Ranks share the images, none
is seen twice, and the numbers are those of one process. On the CPU a process computes with one thread: start
as many ranks as there are cores.

DIR/eval_<jobid>.out   the report, written after the last image; `python -m evaluate.report` reads it
DIR/eval_<jobid>.err   what was left out of the data, or why there is no report
DIR/metrics.json       the report's numbers
"""

from __future__ import annotations

import datetime
import importlib.metadata
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torchvision.models.detection import FasterRCNN

from detect_train.data import DetectionImages
from detect_train.inference import measure, predict
from detect_train.model import from_checkpoint
from evaluate import config, report
from utils import checkpoint, coco, dist, env, files, labels, log, paths, squashfs
from utils.config import to_yaml
from utils.device import describe, resolve_precision
from utils.errors import DivergedError, InputError, RelayError, Stopped, cli, exit_code, one_line
from utils.label_files import is_class_name

PACKAGES = ("torch", "torchvision", "pycocotools")  # whose versions the report names


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Evaluate and report; returns the report's path and the twelve numbers, on every rank."""
    cfg = config.parse(argv)
    run_dir = paths.RunDir(Path(cfg.run_dir))
    out = run_dir.report(env.job_id())
    try:
        with dist.session(cfg.device, run_dir, timeout=cfg.collective_timeout, workers=cfg.workers) as device:
            stats, epochs = evaluate(cfg, run_dir, device)
    except Stopped:
        raise
    except Exception as error:
        out.parent.mkdir(parents=True, exist_ok=True)
        with open(out.with_suffix(".err"), "a") as file:
            cause = str(error) if isinstance(error, RelayError) else traceback.format_exc()
            file.write(f"rank {dist.rank()}: ERROR {exit_code(error)}: {cause}\n")
        raise
    outputs = {"report": out, "metrics": run_dir.report_json}
    return {"outputs": outputs, "metrics": stats, "epochs": epochs}


def evaluate(cfg: config.Config, run_dir: paths.RunDir, device: torch.device) -> tuple[dict[str, float], int]:
    """COCO's twelve numbers by name, and the epochs trained, on every rank; rank 0 writes the report."""
    if dist.rank() == 0:
        files.write_text(run_dir.config, to_yaml(cfg))
        run_dir.report(env.job_id()).unlink(missing_ok=True)  # of this job before it was requeued
    checkpoint.check(Path(cfg.checkpoint))
    saved = load_detector(Path(cfg.checkpoint))
    model, classes = make_detector(cfg.checkpoint, saved)
    root = squashfs.stage(cfg.data.labeled, paths.staging_root(run_dir), run_dir.archives)
    split, cache = cfg.data.split, run_dir.label_index(cfg.data.split)
    index = labels.load(root, split, classes=classes, on_error=cfg.data.on_error, cache=cache)
    precision = resolve_precision(cfg.precision, device)
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)  # the last digits depend on it, and launchers set it by the number of ranks
    machine = {"world_size": dist.size(), "device": describe(device), "precision": precision}
    try:
        detections = predict(
            model.to(device),
            DetectionImages(index, flip=False),
            batch_size=cfg.batch_size,
            workers=cfg.workers,
            device=device,
            precision=precision,
        )
    except DivergedError as error:
        raise InputError(f"{cfg.checkpoint}: {error}: the training diverged") from None
    finally:
        torch.set_num_threads(threads)
    stats, result = measure(index, detections, device)
    if result:
        write(cfg, run_dir, saved, index, machine, result)
    return stats, saved["epochs_done"]


def load_detector(path: Path) -> dict[str, Any]:
    """A detector's checkpoint.

    Raises: InputError when it is something else (which says so of a backbone), or its weights are not finite.
    """
    try:
        saved = checkpoint.load(path, "detector", "give a checkpoint of detect_train")
    except InputError:
        if is_backbone(checkpoint.read(path)):
            raise InputError(f"{path} is a backbone only: train a detector on it first (detect_train)") from None
        raise
    # torchvision drops boxes with NaN scores: such weights would be reported as AP 0
    if bad := [name for name, value in saved["model"].items() if not torch.isfinite(value).all()]:
        raise InputError(f"{path}: {len(bad)} tensors are not finite, first {bad[0]}: the training diverged")
    return saved


def make_detector(path: str, saved: dict[str, Any]) -> tuple[FasterRCNN, tuple[str, ...]]:
    """The detector of a checkpoint and its classes. Raises: InputError when its parts contradict each other."""
    names, count = saved["classes"], saved["architecture"].get("num_classes")
    if not all(map(is_class_name, names)) or len(set(names)) != len(names) or count != len(names) + 1:
        raise InputError(f"{path}: {len(names)} distinct class names expected for num_classes={count}")
    try:
        return from_checkpoint(saved)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{path}: its weights are not those of the architecture it names: {one_line(error)}") from None


def is_backbone(content: dict[str, Any]) -> bool:
    """Whether a weights file holds a ResNet, under whatever names, and no detector around it."""
    names = [str(key) for part in (content, *content.values()) if isinstance(part, dict) for key in part]
    resnet = any(name.endswith("layer1.0.conv1.weight") for name in names)
    return resnet and not any("rpn." in name for name in names)


def write(
    cfg: config.Config,
    run_dir: paths.RunDir,
    saved: dict[str, Any],
    index: labels.LabelIndex,
    machine: dict[str, Any],
    result: coco.Result,
) -> None:
    """Write metrics.json, the .err file and, last, the report."""
    content = {
        "job": env.job_id(),
        "date": datetime.datetime.now().astimezone().isoformat(" ", "seconds"),
        "checkpoint": cfg.checkpoint,
        "sha256": files.sha256(Path(cfg.checkpoint)),
        "epoch": saved["epochs_done"] - 1,
        "resumes": saved["resumes"],  # of all rounds
        "exact": f"no, {'; '.join(saved['inexact'])}" if saved["inexact"] else "yes",
        "data": cfg.data.labeled,
        "split": index.split,
        "images": len(index),
        "skipped": len(index.problems),
        "classes": list(index.classes),
        "architecture": saved["architecture"],
        "batch_size": cfg.batch_size,
        **machine,
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "stats": result.stats,
        "per_class": result.per_class,
    }
    out = run_dir.report(content["job"])
    files.write_json(run_dir.report_json, content)
    files.write_text(out.with_suffix(".err"), "".join(f"left out: {problem}\n" for problem in index.problems))
    files.write_text(out, report.render(content, result.table))
    log.info(f"AP of {cfg.checkpoint} on {index.split}\n{result.table}\nreport: {out}")


if __name__ == "__main__":
    cli(main)
