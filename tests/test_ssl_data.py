"""Unlabelled images and MoCo v2's views."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from ssl_train.data import UnlabeledImages, View, random_view
from utils import loader
from utils.errors import InputError
from utils.images import MEAN, STD

CPU = torch.device("cpu")
PUBLISHED: dict[str, Any] = {
    "image_size": 24, "crop_scale": (0.2, 1.0), "jitter": (0.4, 0.4, 0.4, 0.1), "jitter_p": 0.8,
    "grayscale_p": 0.2, "blur_p": 0.5, "blur_sigma": (0.1, 2.0),
}  # fmt: skip
NOTHING = {"crop_scale": (1.0, 1.0), "jitter_p": 0.0, "grayscale_p": 0.0, "blur_p": 0.0}


def view(**changes: Any) -> View:
    return random_view(**{**PUBLISHED, **changes})


def write_images(folder: Path, count: int = 7) -> Path:
    rng = np.random.default_rng(0)
    for number in range(count):
        file = folder / f"{number % 2}" / f"{number}.PNG"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (32, 40, 3), dtype=np.uint8)).save(file)
    return folder


def pixels(tensor: torch.Tensor) -> torch.Tensor:
    """(3, h, w) as normalised -> (h, w, 3), uint8 levels."""
    levels = (tensor * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]) * 255
    return levels.round().permute(1, 2, 0)


def test_two_views_of_an_image_are_drawn_independently(tmp_path: Path) -> None:
    data = UnlabeledImages(write_images(tmp_path), view())
    assert len(data) == 7
    for index in range(7):
        query, key = data[index]
        assert query.shape == key.shape == (3, 24, 24)
        assert not torch.equal(query, key)
    flips = UnlabeledImages(tmp_path, view(**NOTHING))
    torch.manual_seed(0)
    assert len({torch.equal(*flips[0]) for _ in range(20)}) == 2, "both flip together"


@pytest.mark.parametrize("workers", [1, 2])
def test_views_depend_on_seed_epoch_and_index_only(tmp_path: Path, workers: int) -> None:
    data = loader.Seeded(UnlabeledImages(write_images(tmp_path), view()), seed=5)

    def one_epoch(workers: int, epoch: int) -> list[torch.Tensor]:
        batches = loader.GlobalBatches(len(data), 2, seed=5)
        batches.go_to(epoch, 0)
        made = loader.make(data, batches, workers=workers, device=CPU)
        return [torch.stack(pair) for pair in made]

    alone = one_epoch(0, epoch=1)
    assert len(alone) == 3 and alone[0].shape == (2, 2, 3, 24, 24)
    assert all(torch.equal(a, b) for a, b in zip(alone, one_epoch(workers, epoch=1), strict=True))
    assert torch.equal(data[1, 4][0], data[1, 4][0])
    assert not torch.equal(data[1, 4][0], data[2, 4][0])


def test_each_part_of_the_augmentation_does_what_it_says() -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8))
    flat = Image.new("RGB", (24, 24), (200, 60, 60))
    original = torch.from_numpy(np.array(picture)).float()

    def either_way(result: torch.Tensor, expected: torch.Tensor) -> bool:
        return torch.equal(result, expected) or torch.equal(result, expected.flip(1))

    assert either_way(pixels(view(**NOTHING)(picture)), original)
    blurred = torch.from_numpy(np.array(picture.filter(ImageFilter.GaussianBlur(1.5)))).float()
    blur = view(**{**NOTHING, "blur_p": 1.0, "blur_sigma": (1.5, 1.5)})
    assert either_way(pixels(blur(picture)), blurred)
    gray = pixels(view(**{**NOTHING, "grayscale_p": 1.0})(picture))
    assert torch.equal(gray[..., 0], gray[..., 1]) and torch.equal(gray[..., 0], gray[..., 2])
    jittered = {tuple(pixels(view(**{**NOTHING, "jitter_p": 1.0})(flat))[0, 0].tolist()) for _ in range(9)}
    assert len(jittered) == 9
    gradient = Image.fromarray(np.repeat(np.arange(0, 240, 10, dtype=np.uint8), 72).reshape(24, 24, 3))
    crops = [pixels(view(**{**NOTHING, "crop_scale": (0.2, 0.3)})(gradient)) for _ in range(9)]
    assert max(crop.max() - crop.min() for crop in crops) <= 0.3**0.5 * (4 / 3) ** 0.5 * 240


def test_data_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(InputError, match=rf"{tmp_path}: no PNG or JPEG"):
        UnlabeledImages(tmp_path, view())
    write_images(tmp_path)
    broken = tmp_path / "1" / "3.PNG"
    broken.write_bytes(broken.read_bytes()[:500])
    data = UnlabeledImages(tmp_path, view())
    batches = loader.GlobalBatches(7, 7, 0)
    for workers in (0, 1):
        with pytest.raises((OSError, InputError), match=str(broken)):
            list(loader.make(loader.Seeded(data, 0), batches, workers=workers, device=CPU))
