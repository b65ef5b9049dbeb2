"""Both views of an image: this project's back ends against MoCo's published pipeline, alone and through the loader.

    python -m bench.augment [--images 192]

The peer is the augmentation of facebookresearch/moco, `--aug-plus`: torchvision's transforms on Pillow images, two
float32 crops a sample, through a DataLoader. Rows of the loader count the CPU of the worker and of the main process,
each variant in fresh processes, and include decoding PNG files of 224x224.
"""

from __future__ import annotations

import io
import multiprocessing
import random
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image, ImageFilter
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from bench.measure import Row, arguments, cpu, rates, report
from ssl_train import augment_device, augment_opencv
from ssl_train.augment import Streams, draw
from ssl_train.config import parse
from ssl_train.data import Share, Views
from utils import image_cache, loader
from utils.images import MEAN, STD
from utils.sample_scenes import scene
from utils.tree import Folder

SIDE = 224
BATCH = 64
AUGMENT = parse(["--run-dir", "bench", "--dataset-root", "bench"]).augment
NUMBERS = {name: value for name, value in vars(AUGMENT).items() if name not in ("backend", "image_size")}


class Blur:
    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(0.1, 2.0)))


PUBLISHED = transforms.Compose(
    [
        transforms.RandomResizedCrop(SIDE, scale=(0.2, 1.0)),
        transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
        transforms.RandomGrayscale(p=0.2),
        transforms.RandomApply([Blur()], p=0.5),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(MEAN, STD),
    ]
)


class TwoCrops(Dataset[list[torch.Tensor]]):
    """What the published data set gives: ImageFolder's loading, and the pipeline twice."""

    def __init__(self, files: list[Path]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> list[torch.Tensor]:
        with open(self.files[index], "rb") as file:
            image = Image.open(file).convert("RGB")
        return [PUBLISHED(image), PUBLISHED(image)]


def photos(count: int) -> list[np.ndarray]:
    """Generated photographs: 16 scenes, and crops of each that are the others."""
    scenes = [np.asarray(scene(np.random.default_rng(number), 320, 320, 4)[0]) for number in range(16)]
    places = np.random.default_rng(0).integers(0, 320 - SIDE + 1, (count, 2)).tolist()
    return [
        scenes[number % 16][top : top + SIDE, left : left + SIDE].copy() for number, (top, left) in enumerate(places)
    ]


def augmentation(images: list[np.ndarray]) -> list[Row]:
    pictures, streams = [Image.fromarray(image) for image in images], Streams(0, 0)
    table = augment_device.numbers(
        [draw(streams.at(i, which), SIDE, SIDE, **NUMBERS) for i in range(8) for which in (0, 1)], 2.0
    )
    few = torch.from_numpy(np.stack(images[:8])).repeat_interleave(2, 0)

    def opencv() -> None:
        for index, image in enumerate(images):
            for which in (0, 1):
                augment_opencv.apply(image, draw(streams.at(index, which), SIDE, SIDE, **NUMBERS), SIDE)

    def published(count: int) -> Callable[[], None]:
        def run() -> None:
            for picture in pictures[:count]:
                PUBLISHED(picture), PUBLISHED(picture)

        return run

    def device() -> None:
        for _ in range(3):
            augment_device.apply(few, table, SIDE)

    return [
        rates("both views, OpenCV", opencv, published(len(images)), items=len(images), unit="images", goal=7),
        rates("both views, device back end, eager on the CPU", device, published(24), items=24, unit="images"),
    ]


def ours(folder: Path, cache: str | None, backend: str, rounds: int) -> tuple[DataLoader[Any], int]:
    source = image_cache.of(Folder(folder), cache, 0)
    views = Views(source, seed=0, **{**vars(AUGMENT), "backend": backend})
    batches: Any = []
    for epoch in range(rounds):
        order = np.random.default_rng(epoch).permutation(len(source))
        for start in range(0, len(order) - BATCH + 1, BATCH):
            batch = order[start : start + BATCH]
            batches.append(Share(epoch, batch, np.random.default_rng(start).permutation(batch), np.arange(BATCH)))
    made = loader.make(views, batches, workers=1, device=torch.device("cpu"), collate=loader.whole)
    return made, len(batches) * BATCH


def published(folder: Path) -> tuple[DataLoader[Any], int]:
    data = TwoCrops(sorted(folder.iterdir()))
    return DataLoader(data, BATCH, shuffle=True, num_workers=1, drop_last=True), len(data) // BATCH * BATCH


def one_run(make: Callable[..., tuple[DataLoader[Any], int]], args: tuple[Any, ...], answer: Any) -> None:
    """CPU seconds an image, of this process and its worker, which is ended to be counted; what stays is left out."""
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    made, count = make(*args)
    before = cpu()
    iterator = iter(made)
    for _ in iterator:
        pass
    workers = iterator._workers  # type: ignore[attr-defined]
    iterator._shutdown_workers()  # type: ignore[attr-defined]
    for worker in workers:
        worker.join()
    answer.send((cpu() - before) / count)


def per_image(make: Callable[..., tuple[DataLoader[Any], int]], *args: Any) -> float:
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=one_run, args=(make, args, there))
    process.start()
    found = here.recv()
    process.join()
    return float(found)


def whole_loader(images: list[np.ndarray], rounds: int = 3) -> list[Row]:
    variants: list[tuple[str, str, bool, int, float | None]] = [
        ("loader: PNG files, OpenCV, two uint8 views", "opencv", False, 1, None),
        ("loader: PNG files, two uint8 crops for the device", "device", False, 1, None),
        ("loader: cache, OpenCV, two uint8 views", "opencv", True, 2, None),
        ("loader: cache, uint8 images for the device", "device", True, 24, 40),
    ]
    with tempfile.TemporaryDirectory() as name:
        folder, cache = Path(name) / "images", str(Path(name) / "cache")
        folder.mkdir()
        for number, image in enumerate(images):
            content = io.BytesIO()
            Image.fromarray(image).save(content, "PNG")
            (folder / f"{number:05}.png").write_bytes(content.getvalue())
        image_cache.of(Folder(folder), cache, 0)
        rows: list[list[tuple[float, float]]] = [[] for _ in variants]
        for _ in range(rounds):
            peer = per_image(published, folder)
            for row, (_, backend, cached, epochs, _) in zip(rows, variants, strict=True):
                row.append((per_image(ours, folder, cache if cached else None, backend, epochs), peer))
    found = []
    for (claim, *_, goal), pairs in zip(variants, rows, strict=True):
        mine, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratio = statistics.median(b / a for a, b in pairs)
        found.append(Row(claim, f"{mine * 1e6:,.0f} us/image", f"{theirs * 1e6:,.0f} us/image", ratio, goal))
    return found


def main() -> None:
    given = arguments(__doc__, images=192)
    torch.set_num_threads(1)
    images = photos(given.images)
    report("augment, per CPU second of one core", augmentation(images) + whole_loader(images))


if __name__ == "__main__":
    main()
