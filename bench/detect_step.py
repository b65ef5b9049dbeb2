"""The detector's training step against torchvision's own, same sizes and same weights.

    python -m bench.detect_step [--rounds 3] [--pixels 256]

CPU seconds of forward, backward and update; then what depends on no machine: operators, and how often the host waits
for the device, counted as a GPU would run them. With CUDA also ResNet-50 at 800 pixels, 16 images, bf16.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import numpy as np
import torch
import torchvision
from torch import nn

from bench.measure import Row, arguments, race, report, wall
from bench.operators import Operators
from bench.peers import torchvision_detector
from detect_train import model, nms, norms
from detect_train.targets import Batch, Targets, pad
from utils.device import autocast, resolve_precision
from utils.sample_scenes import scene

Example = tuple[torch.Tensor, dict[str, torch.Tensor]]
SETTINGS: dict[str, Any] = {
    "num_classes": 101, "backbone": "resnet18", "trainable_layers": 5, "norm": "frozen", "max_size": 1333,
    "anchor_sizes": (32, 64, 128, 256, 512), "proposals_train": 2000, "proposals_test": 1000, "box_batch_size": 512,
    "score_threshold": 0.05, "detections_per_image": 100,
}  # fmt: skip
FEW = {"proposals_train": 20}  # a level: as few as where a picture has little to propose
CPU = torch.device("cpu")


def examples(count: int, pixels: int) -> list[Example]:
    """Scenes of `pixels` x `pixels`, uint8, with 1 to 5 objects."""
    made = []
    for seed in range(count):
        picture, boxes, _ = scene(np.random.default_rng(seed), pixels, pixels, 1 + seed % 5)
        target = {"boxes": torch.tensor(boxes).reshape(-1, 4), "labels": torch.arange(1, 1 + len(boxes))}
        made.append((torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous(), target))
    return made


def step(
    detector: nn.Module, given: Callable[[], tuple[Any, Any]], device: torch.device = CPU, precision: str = "float32"
) -> Callable[[], None]:
    """A training step of `detector` on the images and targets that `given` moves to the device."""
    optimizer = torch.optim.SGD(detector.train().parameters(), lr=1e-4, momentum=0.9)

    def run() -> None:
        with autocast(device, precision):
            losses = detector(*given())
        optimizer.zero_grad(set_to_none=True)
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()

    return run


def ours(given: Sequence[Example], device: torch.device = CPU, precision: str = "float32", **other: Any) -> Any:
    torch.manual_seed(0)
    detector = model.build(**SETTINGS | other).to(device)
    if precision == "bf16":
        detector.to(memory_format=torch.channels_last)
    images, targets = torch.stack([image for image, _ in given]), pad([target for _, target in given])
    if device.type == "cuda":
        images, targets = images.pin_memory(), Targets(*(part.pin_memory() for part in targets))
    return step(detector, lambda: Batch(images, targets).to(device), device, precision)


def peer(given: Sequence[Example], device: torch.device = CPU, **other: Any) -> Any:
    torch.manual_seed(0)
    detector = torchvision_detector.build(**SETTINGS | other).to(device)
    detector.transform.torch_choice = lambda sizes: sizes[-1]  # its draw is no question to the device
    floats = [(image.float() / 255, target) for image, target in given]

    def moved() -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
        targets = [{name: value.to(device) for name, value in target.items()} for _, target in floats]
        return [image.to(device) for image, _ in floats], targets

    return step(detector, moved, device)


@contextlib.contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Both take the way that they take on CUDA for these numbers of boxes: suppression of all of them in one call."""
    boxes = torchvision.ops.boxes
    together = mock.patch.object(boxes, "_batched_nms_vanilla", boxes._batched_nms_coordinate_trick)
    with together, mock.patch.object(nms, "ONE_BY_ONE", set()):
        yield


def counted(work: Callable[[], None]) -> Operators:
    """What a step asks for, its first left aside."""
    with as_on_a_gpu():
        work()
        with Operators() as operators:
            work()
    return operators


def counts(pixels: int) -> list[Row]:
    rows, waits = [], {}
    small = {"proposals_train": 100, "box_batch_size": 64}  # quick; the counts are those of any size
    sizes: dict[str, Any] = {"backbone": "resnet50", "min_size": (pixels,), **small}
    for images in (2, 8):
        given = examples(images, pixels)
        mine, theirs = counted(ours(given, **sizes)), counted(peer(given, **sizes))
        waits[images] = mine.waits.total()
        claim = f"ResNet-50: operators a step, {images} images"
        rows += [
            Row(claim, f"{mine.calls:,}", f"{theirs.calls:,}", theirs.calls / mine.calls),
            Row(
                f"  waits for the device a step, {images} images",
                f"{waits[images]}",
                f"{theirs.waits.total()}",
                theirs.waits.total() / waits[images],
                goal=3,
            ),
        ]
    return [
        *rows,
        Row("  waits with 8 images, ours, and with 2, ours", str(waits[8]), str(waits[2]), waits[2] / waits[8], 1),
    ]


def timed(claim: str, mine: Callable[[], None], theirs: Callable[[], None], rounds: int, goal: float | None) -> Row:
    a, b, ratio = race(mine, theirs, rounds=rounds)
    return Row(claim, f"{1000 * a:,.0f} ms", f"{1000 * b:,.0f} ms", ratio, goal)


def on_the_cpu(pixels: int, rounds: int) -> Iterator[Row]:
    """The goal is to lose nothing: what these choices are for is a GPU, but a float32 CPU must not pay for them."""
    torch.set_num_threads(1)
    given = examples(2, pixels)
    small: dict[str, Any] = {"min_size": (pixels,)}
    theirs = peer(given, **small)
    yield timed("ResNet-18, 2 images: step", ours(given, **small), theirs, rounds, 0.9)
    with mock.patch.dict(model.NORMS, frozen=torchvision.ops.FrozenBatchNorm2d):
        batched = ours(given, **small)
    yield timed("  batched proposals and losses alone", batched, theirs, rounds, None)
    with mock.patch.dict(torchvision_detector.NORMS, frozen=norms.FrozenNorm):
        normed = peer(given, **small)
    yield timed("  one operation a frozen norm alone", normed, theirs, rounds, None)
    few: dict[str, Any] = {**small, **FEW}
    yield timed("  with few proposals", ours(given, **few), peer(given, **few), rounds, 0.9)
    if resolve_precision("auto", CPU) == "bf16":
        deep: dict[str, Any] = {**small, "backbone": "resnet50"}
        mine = ours(given, precision="bf16", **deep)
        yield timed("ResNet-50, bf16 and channels_last", mine, peer(given, **deep), rounds, 1.8)
    else:
        yield Row("ResNet-50, bf16 and channels_last: this CPU has no bf16", "-", "-", float("nan"))


def several(work: Callable[[], None], steps: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(steps):
            work()
        torch.cuda.synchronize()

    return run


def on_a_gpu(device: torch.device, images: int = 16, pixels: int = 800, steps: int = 10) -> Iterator[Row]:
    """Images a second and peak memory, torchvision's as it comes: float32 weights and features."""
    given = examples(images, pixels)
    big: dict[str, Any] = {"backbone": "resnet50", "min_size": (pixels,)}
    peaks, works = [], []
    for build in (lambda: ours(given, device, "bf16", **big), lambda: peer(given, device, **big)):
        before = torch.cuda.memory_allocated()
        works.append(several(build(), steps))
        torch.cuda.reset_peak_memory_stats()
        works[-1]()
        peaks.append((torch.cuda.max_memory_allocated() - before) / 2**30)
    mine, theirs, _ = race(*works, rounds=3, clock=wall)
    rates = [steps * images / seconds for seconds in (mine, theirs)]
    claim = f"{torch.cuda.get_device_name()}: ResNet-50, {images} images of {pixels} px"
    yield Row(claim, f"{rates[0]:.1f} images/s", f"{rates[1]:.1f} images/s", rates[0] / rates[1], 1.5)
    yield Row("  against 100 images/s", f"{rates[0]:.1f} images/s", "100 images/s", rates[0] / 100, 1)
    yield Row("  peak memory", f"{peaks[0]:.1f} GiB", f"{peaks[1]:.1f} GiB", peaks[1] / peaks[0])


def main() -> None:
    chosen = arguments(__doc__, rounds=3, pixels=256)
    rows = [*counts(128), *on_the_cpu(chosen.pixels, chosen.rounds)]
    if torch.cuda.is_available():
        rows += on_a_gpu(torch.device("cuda"))
    else:
        rows.append(Row("ResNet-50, 16 images of 800 px: no GPU here", "-", "-", float("nan")))
    report("The detector's step and torchvision's", rows)


if __name__ == "__main__":
    main()
