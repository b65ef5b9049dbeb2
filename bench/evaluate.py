"""COCO's numbers: our evaluator against pycocotools, all that follows the model against torchvision's reference code.

    python -m bench.evaluate [--images 1000] [--rounds 2] [--epilogue 1000]

Evaluator: 100 detections an image of 100 classes. Both start from the same arrays, each time in a process of its own,
and end with the same twelve numbers. Memory is the highest resident size while it evaluates above that before.

Epilogue: from the outputs of a model, which answers at once, to the numbers. The peer does what torchvision's
references/detection does at batch 2, see `bench/peers/coco_reference.py`; some of it costs more an image the more
images there are. Ours: `predict`, with its loader, then `measure`.
"""

from __future__ import annotations

import io
import multiprocessing
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

from bench.measure import Row, arguments, cpu, rates, report, wall
from bench.peers import coco_reference
from bench.peers.coco_reference import Outputs
from detect_train.data import Example
from detect_train.inference import measure, predict
from utils import coco
from utils.labels import LabelIndex
from utils.sample_scenes import scene
from utils.tree import Folder

CLASSES = 100
FOUND = 100  # detections an image
RIVALS = 8  # classes an image's objects are mistaken for
WIDTH, HEIGHT = 500, 375
BATCH = 2


def split(images: int) -> tuple[LabelIndex, np.ndarray]:
    """A split with 1 to 13 boxes an image, and detections: a third right, the others of a few wrong classes."""
    random = np.random.default_rng(0)
    counts = random.integers(1, 14, images)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    size = np.exp(random.uniform(np.log(8), np.log(300), (offsets[-1], 2)))
    corner = random.uniform(0, [WIDTH, HEIGHT], size.shape)
    index = LabelIndex(
        tree=Folder(Path(__file__).parent / "results"),  # nothing is read from it
        split="validation",
        classes=tuple(f"class {number}" for number in range(1, CLASSES + 1)),
        ids=np.arange(1, images + 1),
        numbers=np.zeros(images, dtype=np.int64),
        sizes=np.full((images, 2), (WIDTH, HEIGHT)),
        offsets=offsets,
        boxes=np.hstack([corner, corner + size]),
        labels=random.integers(1, CLASSES + 1, offsets[-1]),
        problems=(),
    )
    near = offsets[:-1].repeat(FOUND) + random.integers(0, counts.repeat(FOUND))
    boxes = index.boxes[near] + random.normal(0, 6, (images * FOUND, 4))
    labels = index.labels[near]
    rivals = random.integers(1, CLASSES + 1, (images, RIVALS)).repeat(FOUND, axis=0)
    astray = random.random(len(labels)) < 2 / 3
    labels[astray] = rivals[np.arange(len(labels)), random.integers(0, RIVALS, len(labels))][astray]
    boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2])
    scores = random.random((images, FOUND)).astype(np.float32)
    scores = -np.sort(-scores, axis=1)  # a detector's order
    return index, np.column_stack([index.ids.repeat(FOUND), boxes.astype(np.float32), scores.ravel(), labels])


class Cost(NamedTuple):
    wall: float  # seconds
    cpu: float  # seconds, of all threads
    memory: int  # bytes
    stats: dict[str, float]


def peak() -> int:
    """The highest resident size of this process so far, in bytes. (getrusage's would include the parent's.)"""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def alone(evaluator: coco.Evaluator, folder: str) -> Cost:
    """What an evaluation costs in this fresh process, its imports not counted."""
    index, _ = split(1)
    with np.load(f"{folder}/split.npz") as saved:
        arrays = {name: saved[name] for name in saved.files}
    detections = arrays.pop("detections")
    coco.evaluate(index, detections[:1], evaluator)
    index = LabelIndex(**{**vars(index), **arrays})
    before, began = peak(), (wall(), cpu())
    stats = coco.evaluate(index, detections, evaluator).stats
    return Cost(wall() - began[0], cpu() - began[1], peak() - before, stats)


def evaluators(images: int, rounds: int) -> list[Row]:
    """Wall time and memory of both, by turns, each time in a new process."""
    costs: dict[coco.Evaluator, list[Cost]] = {"hotcoco": [], "pycocotools": []}
    with tempfile.TemporaryDirectory() as folder:
        index, detections = split(images)
        names = ("ids", "sizes", "offsets", "boxes", "labels")
        np.savez(f"{folder}/split.npz", detections=detections, **{name: vars(index)[name] for name in names})
        for _ in range(rounds):
            for evaluator, found in costs.items():
                with multiprocessing.get_context("spawn").Pool(1) as child:
                    found.append(child.apply(alone, (evaluator, folder)))
    ours, peer = costs.values()
    assert all(cost.stats == ours[0].stats for cost in (*ours, *peer))

    def row(claim: str, goal: float | None, show: str, values: Callable[[Cost], float]) -> Row:
        mine, theirs = (statistics.median(map(values, found)) for found in (ours, peer))
        ratio = statistics.median(values(b) / values(a) for a, b in zip(ours, peer, strict=True))
        return Row(claim, show.format(mine), show.format(theirs), ratio, goal)

    return [
        row(f"evaluator, images: {images:,}, rounds: {rounds}, CPU time", 50, "{:.2f} s", lambda cost: cost.cpu),
        row("evaluator, wall time", None, "{:.2f} s", lambda cost: cost.wall),  # of two threads and more
        row("evaluator, memory", 5, "{:,.0f} MiB", lambda cost: cost.memory / 2**20),
    ]


class Blank(Dataset[Example]):
    """The same images for the model that answers at once: one pixel each."""

    def __init__(self, index: LabelIndex) -> None:
        self.index, self.pixel = index, torch.zeros((3, 1, 1), dtype=torch.uint8)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> Example:
        return self.pixel, {"image_id": int(self.index.ids[i])}


class Answers(nn.Module):
    """A detector that knows its answers: `outputs`, image after image."""

    def __init__(self, outputs: Outputs) -> None:
        super().__init__()
        self.rpn, self.roi_heads = (nn.ModuleDict({name: nn.Identity()}) for name in ("head", "box_predictor"))
        self.outputs, self.given = outputs, 0

    def forward(self, images: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        self.given += len(images)
        return list(self.outputs[self.given - len(images) : self.given])


def ours(index: LabelIndex, outputs: Outputs) -> list[float]:
    """The twelve numbers, our way."""
    device, model = torch.device("cpu"), Answers(outputs)
    detections = predict(model, Blank(index), batch_size=BATCH, workers=0, device=device, precision="float32")
    return list(measure(index, detections, device)[0].values())


def epilogue(images: int) -> Row:
    """All that follows the model; one round, as the peer takes long."""
    index, detections = split(images)
    outputs = []
    for rows in torch.from_numpy(detections).split(FOUND):
        outputs.append({"boxes": rows[:, 1:5].float(), "scores": rows[:, 5].float(), "labels": rows[:, 6].long()})
    photos = []
    for seed in range(10):
        picture, _, _ = scene(np.random.default_rng(seed), WIDTH, HEIGHT, 4)
        picture.save(content := io.BytesIO(), "JPEG", quality=94)
        photos.append(content.getvalue())
    dataset, answers = coco_reference.Photos(index, photos), {}

    def mine() -> None:
        answers["ours"] = ours(index, outputs)

    def peer() -> None:
        answers["peer"] = coco_reference.numbers(dataset, outputs, BATCH)

    claim = f"epilogue, images: {images:,}, CPU time"
    row = rates(claim, mine, peer, items=images, unit="images", goal=50, rounds=1)
    assert np.allclose(answers["ours"], answers["peer"], atol=1e-3), answers  # the peer's widths are of float32
    return row


def main() -> None:
    given = arguments(__doc__, images=5000, rounds=1, epilogue=1000)
    report("evaluate", [*evaluators(given.images, given.rounds), epilogue(given.epilogue)])


if __name__ == "__main__":
    main()
