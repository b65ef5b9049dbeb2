"""Batches of two views of each unlabelled image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from ssl_train.data import Batch, Share, Views, to_device
from utils import image_cache, loader
from utils.errors import InputError
from utils.image_cache import Decoded
from utils.images import MEAN, STD
from utils.tree import Folder

CPU = torch.device("cpu")
SETTINGS: dict[str, Any] = {
    "seed": 5, "backend": "opencv", "image_size": 32, "crop_scale": (0.2, 1.0), "jitter": (0.4, 0.4, 0.4, 0.1),
    "jitter_p": 0.8, "grayscale_p": 0.2, "blur_p": 0.5, "blur_sigma": (0.1, 2.0),
}  # fmt: skip
BACKENDS = ("opencv", "device", "pil")


def write_images(folder: Path, count: int = 8) -> Path:
    rng = np.random.default_rng(0)
    for number in range(count):
        file = folder / f"{number % 2}" / f"{number}.PNG"
        file.parent.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
        small.resize((40, 36), Image.Resampling.BICUBIC).save(file)
    return folder


def share(epoch: int, query: list[int], key: list[int]) -> Share:
    return Share(epoch, np.array(query), np.array(key), np.arange(len(key)))


def both(views: Views, *given: Any) -> torch.Tensor:
    """(2, n, 3, S, S): the query and the key views."""
    return torch.stack(to_device(views.__getitems__(share(*given)), CPU))


@pytest.fixture(params=["decoded", "cached"])
def images(request: pytest.FixtureRequest, tmp_path: Path) -> image_cache.Images:
    folder = str(tmp_path / "cache") if request.param == "cached" else None
    return image_cache.of(Folder(write_images(tmp_path / "images")), folder, 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_view_depends_on_seed_epoch_image_and_which_it_is_only(images: image_cache.Images, backend: str) -> None:
    views = Views(images, **{**SETTINGS, "backend": backend})
    query, key = both(views, 3, [0, 1, 2, 3], [0, 1, 2, 3])
    assert query.shape == (4, 3, 32, 32) and query.dtype == torch.float32
    assert query.is_contiguous(memory_format=torch.channels_last)
    assert not any(torch.equal(a, b) for a, b in zip(query, key, strict=True))
    other_query, other_key = both(views, 3, [7, 2, 0, 5], [1, 3, 6, 4])
    assert torch.allclose(other_query[[2, 1]], query[[0, 2]], atol=1e-5)
    assert torch.allclose(other_key[:2], key[[1, 3]], atol=1e-5)
    for changed in (both(views, 4, [0, 1], [0, 1]), both(Views(images, **{**SETTINGS, "seed": 6}), 3, [0, 1], [0, 1])):
        assert not torch.allclose(changed[0], query[:2], atol=0.1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_loader_processes_change_no_byte(images: image_cache.Images, backend: str) -> None:
    views = Views(images, **{**SETTINGS, "backend": backend})
    shares: Any = [share(epoch, [0, 3, 6], [6, 0, 3]) for epoch in range(5)]

    def made(workers: int) -> list[Batch]:
        return list(loader.make(views, shares, workers=workers, device=CPU, collate=loader.whole))

    alone = made(0)
    for workers in (1, 2):
        for a, b in zip(alone, made(workers), strict=True):
            assert all(
                torch.equal(one, other)
                for one, other in zip(a, b, strict=True)
                if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)
            )


def test_back_ends_make_the_same_views(images: image_cache.Images) -> None:
    indices = list(range(8))
    reference = both(Views(images, **{**SETTINGS, "backend": "pil"}), 0, indices, indices)
    level = 1 / 255 / min(STD)
    for backend in ("opencv", "device"):
        difference = (both(Views(images, **{**SETTINGS, "backend": backend}), 0, indices, indices) - reference).abs()
        assert difference.mean() < 2 * level and difference.quantile(0.999) < 15 * level, backend


def test_views_are_normalised_as_published(images: image_cache.Images) -> None:
    nothing = {"crop_scale": (1.0, 1.0), "jitter_p": 0.0, "grayscale_p": 0.0, "blur_p": 0.0}
    steps = [transforms.Resize((32, 32)), transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    published = transforms.Compose(steps)(Image.fromarray(images.pixels(2)))
    level = 1.01 / 255 / min(STD)
    for backend, tolerance in (("opencv", level), ("device", level), ("pil", 1e-5)):
        made = both(Views(images, **{**SETTINGS, **nothing, "backend": backend}), 0, [2], [2])[0, 0]
        assert min((made - expected).abs().max() for expected in (published, published.flip(-1))) < tolerance, backend


def test_an_image_is_decoded_once_for_both_views(tmp_path: Path) -> None:
    read: list[int] = []

    class Counting(Folder):
        def read(self, number: int) -> bytes:
            read.append(number)
            return super().read(number)

    views = Views(Decoded(Counting(write_images(tmp_path))), **SETTINGS)
    views.__getitems__(share(0, [4, 1, 7], [1, 7, 2]))
    assert sorted(read) == [1, 2, 4, 7]


def test_the_device_gets_each_cached_image_once_and_crops_where_those_are_less(tmp_path: Path) -> None:
    cached = image_cache.of(Folder(write_images(tmp_path / "images")), str(tmp_path / "cache"), 0)
    batch = Views(cached, **{**SETTINGS, "backend": "device"}).__getitems__(share(0, [4, 1], [1, 7]))
    assert batch.images is not None and batch.images.shape == (3, 36, 40, 3)
    small = {**SETTINGS, "backend": "device", "image_size": 26}
    batch = Views(cached, **small).__getitems__(share(0, [4, 1], [1, 7]))
    assert batch.images is None and batch.query.shape == (2, 26, 26, 3)


def test_an_image_that_cannot_be_decoded_is_named(tmp_path: Path) -> None:
    write_images(tmp_path)
    broken = tmp_path / "1" / "3.PNG"
    broken.write_bytes(broken.read_bytes()[:500])
    views = Views(Decoded(Folder(tmp_path)), **SETTINGS)
    shares: Any = [share(0, list(range(8)), list(range(8)))]
    for workers in (0, 1):
        with pytest.raises(InputError, match=str(broken)):
            list(loader.make(views, shares, workers=workers, device=CPU, collate=loader.whole))
