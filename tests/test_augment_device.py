"""Views made on the device: nothing that waits for it, and the same compiled."""

from __future__ import annotations

import shutil

import pytest
import torch

from bench.operators import Operators
from ssl_train import augment_device
from ssl_train.data import Batch, to_device
from tests.test_augment import many

SIGMA = 2.0
SIZE = (40, 30)


def whole_images(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.randint(0, 256, (n, SIZE[1], SIZE[0], 3), dtype=torch.uint8, generator=torch.Generator())
    return images, augment_device.numbers(many(2 * n, SIZE), SIGMA)


def test_nothing_waits_for_the_device_and_the_calls_do_not_grow_with_the_batch() -> None:
    counts = []
    crop = torch.zeros(1, 24, 24, 3, dtype=torch.uint8)
    to_device(Batch(crop, crop, torch.arange(1), 24), torch.device("cpu"))  # the constants are made once
    for n in (2, 6):
        images, numbers = whole_images(n)
        places, order = torch.arange(n), torch.arange(n)
        crops = torch.zeros(n, 24, 24, 3, dtype=torch.uint8)
        for batch in (
            Batch(places, places.flip(0), order, 24, numbers, images),
            Batch(crops, crops, order, 24, numbers),
            Batch(crops, crops, order, 24),
        ):
            with Operators() as calls:
                to_device(batch, torch.device("cpu"))
            assert calls.calls and not calls.waits
            counts.append(calls.calls)
    assert counts[3:] == counts[:3]
    with Operators() as calls:
        torch.arange(3)[torch.tensor([True, False, True])].sum().item()
    assert calls.waits.total() == 2, "what is looked for is found"


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiled_views_are_the_same() -> None:
    images, numbers = whole_images(2)
    images = images.repeat(2, 1, 1, 1)
    plain = augment_device.views(images, numbers, 16)
    compiled = torch.compile(augment_device.views, fullgraph=True, dynamic=False)(images, numbers, 16)
    assert (compiled - plain).abs().max() < 1e-4


def test_views_do_not_lose_digits_under_autocast() -> None:
    images, numbers = whole_images(2)
    images = images.repeat(2, 1, 1, 1)
    plain = augment_device.apply(images, numbers, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(augment_device.apply(images, numbers, 16), plain)
    assert plain.dtype == torch.float32 and plain.is_contiguous(memory_format=torch.channels_last)
