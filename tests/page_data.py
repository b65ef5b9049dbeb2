"""A chain's directory as one that has run leaves it, without weights: made-up curves, detections from the truth."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from evaluate import detections_file
from utils import coco, files
from utils.labels import LabelIndex
from utils.paths import RunDir

BEGAN = datetime.datetime(2030, 1, 2, 3, 4, 5, tzinfo=datetime.timezone.utc).timestamp()
# name -> first and last epoch, learning rate, steps an epoch, hours, and the stage whose weights it begins with
TRAINED: dict[str, tuple[int, int, float, int, float, str | None]] = {
    "pretrain": (0, 100, 0.015, 200, 20.0, None),
    "r1": (0, 23, 0.03, 400, 9.5, "pretrain"),
    "r2": (23, 27, 0.003, 400, 1.8, "r1"),
    "r3": (27, 37, 0.0003, 400, 4.4, "r2"),
}
COMMITS = {"": "c0ffee" * 6 + "c0ff", "r3": "beef" * 10 + "-dirty"}  # of which code a stage was
PARTS = {
    "start-up": 0.01,
    "staging": 0.015,
    "labels": 0.005,
    "data wait": 0.31,
    "compute": 0.53,
    "validation": 0.11,
    "saving": 0.02,
}


def make_chain(root: Path, index: LabelIndex, labeled: Path, *, last: str = "eval") -> Path:
    """The directory of a chain up to stage `last`; `index` is of the validation split of `labeled`."""
    random = np.random.default_rng(5)
    begins = BEGAN
    submitted: dict[str, dict[str, Any]] = {}
    for name in [*TRAINED, "eval"]:
        run_dir = RunDir(root / name)
        submitted[name] = {"job_id": f"4711{len(submitted)}", "submitted": _date(begins - 900), "log": "", "config": {}}
        hours = TRAINED[name][4] if name in TRAINED else 0.3
        ends = begins + 3600 * hours
        training = name in TRAINED
        config = _config(name, run_dir, labeled)
        marker = _marker(root, name, begins, ends, config)
        if training:
            _write_metrics(run_dir, name, random)
        else:
            marker["metrics"] = _evaluate(run_dir, index, labeled, random)
        files.write_json(run_dir.state, marker)
        files.write_text(run_dir.config, yaml.safe_dump(_nested(config)))
        times: dict[str, Any] = {"restarted": name == "r1", "training": training}
        times["commit"] = COMMITS.get(name, COMMITS[""])
        _write_times(run_dir, submitted[name]["job_id"], begins, ends, **times)
        begins = ends + 900
        if name == last:
            break
    files.write_json(root / "jobs.json", submitted)
    return root


def change(file: Path, **values: Any) -> None:
    """Other values in a JSON file."""
    files.write_json(file, {**json.loads(file.read_text()), **values})


def detections(index: LabelIndex, random: np.random.Generator) -> np.ndarray:
    """(n, 7) rows of coco.COLUMNS: most objects found, some misplaced, of another class, twice, or where none is."""
    rows, count = [], len(index.classes)
    for i in range(len(index)):
        width, height = index.sizes[i].tolist()
        skill = random.beta(5, 2)  # images differ
        for box, label in zip(*index.target(i), strict=True):
            if random.random() > 0.45 + 0.5 * skill:
                continue
            sides = box[2:] - box[:2]
            spread = 0.05 if random.random() < skill else 0.28
            moved = np.clip(box + random.normal(0, spread, 4) * np.tile(sides, 2), 0, np.tile([width, height], 2))
            other = random.random() < 0.1 * (1.2 - skill)
            kind = int(random.integers(1, count + 1)) if other else int(label)
            score = float(np.clip(random.normal(0.55 + 0.4 * skill, 0.15), 0.06, 0.999))
            rows.append([index.ids[i], *np.sort(moved.reshape(2, 2), axis=0).ravel(), score, kind])
            if random.random() < 0.06:
                rows.append([*rows[-1][:5], score * 0.6, kind])
        for _ in range(random.poisson(1.1 * (1.3 - skill))):
            corner = random.uniform(0, 0.7, 2) * (width, height)
            sides = random.uniform(0.08, 0.3, 2) * (width, height)
            score = random.beta(2, 4)
            rows.append([index.ids[i], *corner, *(corner + sides), score, random.integers(1, count + 1)])
    return np.array(rows, dtype=np.float64).reshape(-1, 7)


def _config(name: str, run_dir: RunDir, labeled: Path) -> dict[str, Any]:
    config: dict[str, Any] = {"run_dir": str(run_dir.path), "batch_size": 4, "seed": 0, "workers": 2, "device": "auto"}
    if name == "pretrain":
        return config | {"data.unlabeled": "/data/unlabeled.sqsh", "epochs": 100, "optim.lr": 0.015}
    config |= {"data.labeled": str(labeled), "data.stage": "direct", "data.on_error": "skip"}
    if name == "eval":
        return config | {"checkpoint": "r3.best", "data.split": "validation"}
    _, epochs, rate, *_ = TRAINED[name]
    warmup = 1000 if name == "r1" else 0
    return config | {"epochs": epochs, "optim.lr": rate, "optim.warmup_steps": warmup, "model.min_size": [800]}


def _nested(config: dict[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in config.items():
        section, _, rest = key.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[rest] = value
    return nested


def _marker(root: Path, name: str, begins: float, ends: float, config: dict[str, Any]) -> dict[str, Any]:
    parent = TRAINED[name][5] if name in TRAINED else "r3"
    outputs = {"pretrain": ("backbone",), "eval": ()}.get(name, ("last", "best"))
    inputs = {"pretrain": (), "r1": ("backbone",), "eval": ("checkpoint",)}.get(name, ("init", "best"))
    kept = {"backbone": "backbone", "init": "last", "best": "best", "checkpoint": "best"}
    return {
        "chain": root.name,
        "stage": name,
        "status": "done",
        "job_id": "4711",
        "slurm": True,
        "host": "node07",
        "restarts": 1 if name == "r1" else 0,
        "cause": None,
        "log": str(root / name / "logs" / "4711_0_rank0.log"),
        "started": _date(_spans(begins, ends)[1][0] if name == "r1" else begins),  # of the newest attempt
        "ended": _date(ends),
        "config": config,
        "inputs": {key: {"from": f"{parent}.{kept[key]}", "path": "x.pth", "sha256": "ab" * 32} for key in inputs},
        "outputs": {key: {"path": "x.pth", "sha256": "ab" * 32} for key in outputs},
        "epochs": TRAINED[name][1] if name in TRAINED else 37,
        "metrics": {"AP": 0.4} if name.startswith("r") else {"loss_avg": 6.2},
    }


def _write_metrics(run_dir: RunDir, name: str, random: np.random.Generator) -> None:
    first, epochs, rate, steps, *_ = TRAINED[name]
    lines = []
    for epoch in range(first, epochs):
        for step in range(epoch * steps + 50, (epoch + 1) * steps + 1, 50):
            done = step / (100 * steps if name == "pretrain" else 37 * steps)
            if name == "pretrain":
                lr, loss = rate * (1 + np.cos(np.pi * done)) / 2, 6.0 + 2.2 * np.exp(-7 * done)
            else:
                lr = rate * min(1.0, step / 1000 if name == "r1" else 1.0)
                loss = 0.5 + 1.7 * np.exp(-6 * done) - {"r1": 0.0, "r2": 0.12, "r3": 0.15}[name]
            loss += random.normal(0, 0.07)
            lines.append({"kind": "train", "epoch": epoch, "step": step, "lr": lr, "images_per_s": 9.5, "loss": loss})
        if name != "pretrain":
            done = (epoch + 1) / 37
            gain = {"r1": 0.0, "r2": 0.05, "r3": 0.06}[name]
            ap = 0.36 * (1 - np.exp(-4 * done)) + gain + random.normal(0, 0.006)
            known = dict.fromkeys(coco.METRICS, -1.0) | {"AP": ap, "AP50": 1.6 * ap, "AP75": 1.03 * ap}
            lines.append({"kind": "val", "epoch": epoch, "step": (epoch + 1) * steps, "best": True, **known})
    run_dir.path.mkdir(parents=True, exist_ok=True)
    run_dir.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _evaluate(run_dir: RunDir, index: LabelIndex, labeled: Path, random: np.random.Generator) -> dict[str, float]:
    rows = detections(index, random)
    result = coco.evaluate(index, rows)
    detections_file.save(run_dir.detections, index, rows)
    content = {
        "job": "47114",
        "date": "2030-01-03 17:00:00+00:00",
        "checkpoint": "runs/x/r3/checkpoints/best.pth",
        "sha256": "cd" * 32,
        "epoch": 36,
        "resumes": 1,
        "exact": "yes",
        "data": str(labeled),
        "split": index.split,
        "images": len(index),
        "skipped": len(index.problems),
        "classes": list(index.classes),
        "world_size": 2,
        "device": "NVIDIA A100-SXM4-40GB",
        "precision": "bf16",
        "evaluator": "hotcoco",
        "versions": {"torch": "2.11.0", "torchvision": "0.26.0", "hotcoco": "1.3.0"},
        "stats": result.stats,
        "per_class": result.per_class,
    }
    files.write_json(run_dir.report_json, content)
    return result.stats


def _write_times(
    run_dir: RunDir, job: str, begins: float, ends: float, *, restarted: bool, training: bool, commit: str
) -> None:
    shares = PARTS if training else {"start-up": 0.06, "staging": 0.05, "labels": 0.03, "evaluation": 0.86}
    for restarts, (start, end) in enumerate(_spans(begins, ends) if restarted else [(begins, ends)]):
        seconds = {part: share * (end - start) for part, share in shares.items()}
        last = restarted and restarts == 0
        content = {
            "job": job,
            "restarts": restarts,
            "world_size": 2,
            "device": "NVIDIA A100-SXM4-40GB",
            "cores": 8,
            "commit": commit,
            "began": start,
            "at": end,
            "seconds": seconds,
            "unsaved": {"compute": 400.0, "data wait": 220.0} if last else {},
            "ended": not last,
        }
        files.write_json(run_dir.path / "times" / f"{job}_{restarts}_{start:.2f}.json", content)


def _spans(begins: float, ends: float) -> list[tuple[float, float]]:
    """Of two attempts."""
    return [(begins, begins + 0.6 * (ends - begins)), (begins + 0.62 * (ends - begins), ends)]


def _date(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc).isoformat(timespec="seconds")
