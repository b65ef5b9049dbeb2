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
DIR/detections.npz     what was found, with the ground truth: for `python -m evaluate.compare` and the report's page
"""

from __future__ import annotations

import datetime
import importlib.metadata
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evaluate import config, report
from utils.errors import DivergedError, InputError, RelayError, Stopped, cli, exit_code

if __name__ == "__main__":
    cli(config.parse)  # --help and a wrong configuration need no torch, whose import takes seconds

import torch

from detect_train import reading
from detect_train.config import refused
from detect_train.inference import measure, predict
from evaluate import detections_file, detector
from utils import coco, dist, env, files, labels, log, metrics_csv, mirror_views, paths, revision, squashfs, timeline
from utils.config import to_yaml
from utils.device import describe, resolve_precision

PACKAGES = ("torch", "torchvision")  # whose versions the report names, besides the evaluator's


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Evaluate and report; returns the report's path and the twelve numbers, on every rank."""
    cfg = config.parse(argv)
    run_dir = paths.RunDir.of(cfg.run_dir)
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
    outputs = {"report": out, "metrics": run_dir.report_json, "detections": run_dir.detections}
    return {"outputs": outputs, "metrics": stats, "epochs": epochs}


def evaluate(cfg: config.Config, run_dir: paths.RunDir, device: torch.device) -> tuple[dict[str, float], int]:
    """COCO's twelve numbers by name, and the epochs trained, on every rank; rank 0 writes the report."""
    if dist.rank() == 0:
        files.write_text(run_dir.config, to_yaml(cfg))
        metrics_csv.write_settings(run_dir, cfg)
        run_dir.report(env.job_id()).unlink(missing_ok=True)  # of this job before it was requeued
    evaluator = coco.library(cfg.evaluator)
    checkpoint = Path(mirror_views.brought(cfg, run_dir).checkpoint)
    saved = detector.load(checkpoint)
    if problem := refused(cfg.device, saved["architecture"].get("head", "rcnn")):  # old ones do not name it
        raise InputError(f"{cfg.checkpoint}: {problem}")
    model, classes = detector.build(cfg.checkpoint, saved)
    timeline.done("start-up")
    tree = squashfs.stage(cfg.data.labeled, paths.staging_root(run_dir), run_dir.archives, cfg.data.stage)
    timeline.done("staging")
    split, cache = cfg.data.split, run_dir.label_index(cfg.data.split)
    index = labels.load(tree, split, classes=classes, on_error=cfg.data.on_error, cache=cache)
    timeline.done("labels")
    precision = resolve_precision(cfg.precision, device)
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)  # the last digits depend on it, and launchers set it by the number of ranks
    machine = {"world_size": dist.size(), "device": describe(device), "precision": precision, "evaluator": evaluator}
    try:
        detections = predict(
            model.to(device),
            reading.of(model).examples(index, flip=False),
            batch_size=cfg.batch_size,
            workers=cfg.workers,
            device=device,
            precision=precision,
        )
    except DivergedError as error:
        raise InputError(f"{cfg.checkpoint}: {error}: the training diverged") from None
    finally:
        torch.set_num_threads(threads)
    stats, result = measure(index, detections, device, evaluator)
    if result:
        detections_file.save(run_dir.detections, index, detections)
        write(cfg, run_dir, checkpoint, saved, index, machine, result)
    timeline.saved("evaluation")
    return stats, saved["epochs_done"]


def write(
    cfg: config.Config,
    run_dir: paths.RunDir,
    checkpoint: Path,
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
        "sha256": files.sha256(checkpoint),
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
        "commit": revision.commit(),
        "versions": {name: importlib.metadata.version(name) for name in (*PACKAGES, machine["evaluator"])},
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
