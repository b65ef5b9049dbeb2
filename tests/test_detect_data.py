"""Targets mean what the label files say, mirrored together with their image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from detect_train.data import DetectionImages, mirror
from detect_train.reading import InSquares, Reader, WholeImages
from detect_train.regions import Rules
from tests.archives import NEEDS_TOOLS
from tests.labeled_set import COLOURS, archived, write_example, write_set
from utils import images, labels
from utils.labels import LabelIndex
from utils.loader import Seeded
from utils.tree import Folder


@pytest.fixture
def index(tmp_path: Path) -> LabelIndex:
    root = write_set(tmp_path / "set")
    return labels.load(Folder(root), "training", classes=None, on_error="error", cache=tmp_path / "cache.index")


def test_targets_count_from_1_and_carry_the_ids(index: LabelIndex) -> None:
    dataset = DetectionImages(index, flip=False)
    image, target = dataset[3]
    assert (image.dtype, tuple(image.shape)) == (torch.uint8, (3, 48, 64))
    assert np.array_equal(image.permute(1, 2, 0).numpy(), np.asarray(images.decode(index.read(3), "3")))
    assert target["image_id"] == 4 and target["labels"].tolist() == [1, 2]
    assert target["boxes"].dtype == torch.float32 and target["boxes"].tolist() == index.target(3)[0].tolist()
    assert target["labels"].dtype == torch.int64


def test_an_image_without_boxes(index: LabelIndex) -> None:
    for flip in (False, True):
        _, target = DetectionImages(index, flip=flip)[0]
        assert target["boxes"].shape == (0, 4) and target["labels"].shape == (0,)


@NEEDS_TOOLS
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_read_an_archive_as_one_process_reads_the_folder(start: str, index: LabelIndex, tmp_path: Path) -> None:
    tree = archived(tmp_path / "set", tmp_path)
    of_archive = labels.load(tree, "training", classes=None, on_error="error", cache=tmp_path / "archive.index")
    here = [DetectionImages(index, flip=False)[i] for i in range(8)]
    of_archive.read(0)  # what is open in this process is no use in a worker
    data = DetectionImages(of_archive, flip=False)
    workers = DataLoader(data, batch_size=None, num_workers=1, multiprocessing_context=start)
    for (image, target), (expected, wanted) in zip(workers, here, strict=True):
        assert torch.equal(image, expected) and torch.equal(target["boxes"], wanted["boxes"])
        assert torch.equal(target["labels"], wanted["labels"]) and target["image_id"] == wanted["image_id"]


def test_mirror_by_hand() -> None:
    image = torch.arange(6).reshape(1, 2, 3)
    flipped, target = mirror(image, {"boxes": torch.tensor([[0.0, 0, 1, 2], [0.5, 1, 3, 2]]), "image_id": 9})
    assert flipped.tolist() == [[[2, 1, 0], [5, 4, 3]]]
    assert target["boxes"].tolist() == [[2, 0, 3, 2], [0, 1, 2.5, 2]]
    assert target["image_id"] == 9


def test_boxes_stay_on_their_objects_when_mirrored(tmp_path: Path) -> None:
    write_example(tmp_path / "training", 1, [[4, 6, 20, 30], [40, 10, 60, 44]], ["cat", "dog"])
    index = labels.load(Folder(tmp_path), "training", classes=None, on_error="error", cache=tmp_path / "cache.index")
    flipping = Seeded(DetectionImages(index, flip=True), 0)
    lefts = set()
    for epoch in range(20):
        image, target = flipping[(epoch, 0)]
        lefts.add(target["boxes"][0, 0].item())
        for box, name in zip(target["boxes"].int().tolist(), ("cat", "dog"), strict=True):
            inside = image[:, box[1] + 2 : box[3] - 2, box[0] + 2 : box[2] - 2].float().mean(dim=(1, 2))
            assert torch.allclose(inside, torch.tensor(COLOURS[name]).float(), atol=12)
        again, _ = flipping[(epoch, 0)]
        assert torch.equal(again, image)
    assert lefts == {4, 44}
    assert DetectionImages(index, flip=False)[0][1]["boxes"][0, 0] == 4


@pytest.mark.parametrize("kind", [WholeImages(), InSquares(64, Rules(0, 0.5, 10), ())])
def test_a_batch_is_asked_for_together(tmp_path: Path, index: LabelIndex, kind: Reader) -> None:
    """Of a bucket its images come at once, and not one after the other."""
    asked: list[tuple[str, list[int]]] = []

    class Watched(Folder):
        def ahead(self, numbers: Sequence[int]) -> None:
            asked.append(("ahead", list(numbers)))

        def read(self, number: int) -> bytes:
            asked.append(("read", [number]))
            return super().read(number)

    images = kind.examples(replace(index, tree=Watched(tmp_path / "set")), flip=True)
    numbers = index.numbers[:3].tolist()
    expected = [("ahead", numbers), *(("read", [number]) for number in numbers)]
    for dataset, keys in ((images, range(3)), (Seeded(images, 0), [(0, i) for i in range(3)])):
        (batch,) = DataLoader(dataset, batch_sampler=[list(keys)], collate_fn=list)
        assert [target["image_id"] for _, target in batch] == index.ids[:3].tolist()
        assert asked == expected
        asked.clear()
