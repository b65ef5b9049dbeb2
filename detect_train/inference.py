"""Detections of a data set and their COCO numbers, the same for any number of ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.data import Dataset

from detect_train import reading
from detect_train.data import Example
from detect_train.targets import to_device
from utils import coco, dist, loader, log, stop, timeline
from utils.device import autocast, on_host
from utils.errors import DivergedError, Stopped
from utils.labels import LabelIndex
from utils.shared_config import COMPILING

LOG_EVERY = 100  # batches


@torch.no_grad()  # not inference_mode: the anchors that are kept here are used in training again
def predict(
    model: nn.Module,
    dataset: Dataset[Example],
    *,
    batch_size: int,
    workers: int,
    device: torch.device,
    precision: str,
    part: str = "evaluation",
) -> np.ndarray:
    """Run a detector over `dataset`, its images split over the ranks, each seen once.

    Args:
        model: in whatever mode; evaluates in eval mode and is put back.
        dataset: `dataset[i]` is (image, target with `image_id`) as the model's reader gives it (`reading.of`), of
            torchvision's detectors a (3, H, W) image; ids are unique.
        batch_size: images in one forward pass of one rank. Part of the result, as torchvision's pad images to the
            largest of their batch; the number of ranks is not. (On the CPU the number of threads is, in the
            last digits.)
        precision: `float32` or `bf16`.
        part: of `attempts.PARTS`, to which its time belongs.

    Returns: (n, 7) float64 on every rank: image_id, x1, y1, x2, y2 (pixels of the original image), score,
        label; by image id, and within an image in the model's order.

    Raises: DivergedError on every rank when a score or box is not finite on any; Stopped on every rank after the
        same batch when a signal asks for the end.
    """
    batches = loader.WholeBatches(len(dataset), batch_size)  # type: ignore[arg-type]
    ids: list[int] = []
    found: list[dict[str, torch.Tensor]] = []
    was_training = model.training
    model.eval()
    wishes = dist.Wishes()
    reader = reading.of(model)
    gather = partial(reader.gather, batch_size=batch_size)
    data = loader.make(dataset, batches, workers=workers, device=device, collate=gather)
    with _watched(model, reader.watched, device) as finite:
        for done, given in enumerate(loader.start(data, device), start=1):
            with autocast(device, precision):
                outputs = model(to_device(given.images, device))
            outputs, _ = on_host((outputs, finite))  # both: else each batch's is the next one's to compute again
            ids += given.ids
            found += reader.detections(outputs, given.sizes)
            timeline.done(part)
            if done % LOG_EVERY == 0:
                log.info(f"detect: {done} of {len(batches)} batches of {batch_size}")
            # as often on every rank, though some have a batch more than others
            if done <= batches.of_every_rank and wishes.exchange(dist.STOP * bool(stop.requested())):
                raise Stopped(
                    f"stopped by {stop.told()} after {done} of {len(batches)} batches; the same again goes on"
                )
    model.train(was_training)
    if dist.mean(finite) < 1:
        raise DivergedError("the detector's scores or boxes are not finite")
    seen = dist.gather_rows(torch.tensor(ids, dtype=torch.int64, device=_common(device)))
    assert len(seen) == len(seen.unique()) == len(dataset), (len(seen), len(dataset))  # type: ignore[arg-type]
    table = dist.gather_rows(_rows(ids, found, _common(device))).cpu().numpy()
    return table[np.argsort(table[:, 0], kind="stable")]


def _rows(ids: list[int], found: list[dict[str, torch.Tensor]], device: torch.device) -> torch.Tensor:
    """(n, 7) of the images' detections, on `device`."""
    counts = torch.tensor([len(each["boxes"]) for each in found], dtype=torch.int64)
    of_image = torch.tensor(ids, dtype=torch.int64).repeat_interleave(counts)
    rows = torch.empty((len(of_image), 7), dtype=torch.float64, device=device)
    rows[:, 0] = of_image
    if found:
        for name, columns in (("boxes", slice(1, 5)), ("scores", 5), ("labels", 6)):
            rows[:, columns] = torch.cat([each[name] for each in found])
    return rows


def _common(device: torch.device) -> torch.device:
    """Where ranks put tables together. On the host for what compiles: each length would be another graph."""
    return torch.device("cpu") if device.type in COMPILING else device


def measure(
    index: LabelIndex, detections: np.ndarray, device: torch.device, evaluator: coco.Evaluator = "auto"
) -> tuple[dict[str, float], coco.Result | None]:
    """COCO's twelve numbers by name on every rank, computed by rank 0, which gets the whole result too."""
    result = coco.evaluate(index, detections, evaluator) if dist.rank() == 0 else None
    numbers = torch.zeros(len(coco.METRICS), dtype=torch.float64, device=_common(device))
    if result:
        numbers.copy_(torch.tensor([result.stats[name] for name in coco.METRICS], dtype=numbers.dtype))
    return dict(zip(coco.METRICS, dist.broadcast(numbers).tolist(), strict=True)), result


@contextlib.contextmanager
def _watched(model: nn.Module, parts: Sequence[str], device: torch.device) -> Iterator[torch.Tensor]:
    """A number on the device, 1 until a score or box offset that `parts` of `model` compute is not finite, then 0.

    torchvision drops boxes with NaN scores: a model whose activations overflow would be reported as AP 0.
    """
    finite = torch.ones(1).to(device)  # as a number, or made there, XLA would take it for part of the first graph

    def check(module: nn.Module, given: Any, outputs: Any) -> None:
        for values in pytree.tree_leaves(outputs):
            finite.mul_(values.isfinite().all())  # nothing waits for it here

    with contextlib.ExitStack() as hooks:
        for name in parts:
            hooks.enter_context(model.get_submodule(name).register_forward_hook(check))
        yield finite
