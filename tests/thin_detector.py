"""What tests on XLA share: a ResNet that is compiled soon, batches, and the count of what was compiled.

They take torch_xla from here: the flag by which it compiles sooner has to be set before it is imported.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torchvision.models import resnet

from detect_train.targets import Batch, Targets
from tests.ranks import XLA

os.environ.setdefault("XLA_FLAGS", XLA["XLA_FLAGS"])
pytest.importorskip("torch_xla", reason="torch_xla has an environment of its own: make install-tpu")

import torch_xla as torch_xla  # for who takes it from here
import torch_xla.debug.metrics as metrics

ROWS = 4
STEPS, COMPARED = 200, 20  # on XLA; on the CPU beside it
GRAPHS = 3  # at most in so many steps


class Thin(resnet.ResNet):
    """As few layers as a ResNet can have, of an eighth of the channels."""

    def __init__(self, name: str = "", *, weights: None, norm_layer: Any = None, num_classes: int = 1) -> None:
        super().__init__(resnet.BasicBlock, [1, 1, 1, 1], norm_layer=norm_layer)
        self.fc = torch.nn.Linear(512 // 8, num_classes)

    def _make_layer(self, block: Any, planes: int, *rest: Any, **options: Any) -> torch.nn.Sequential:
        return super()._make_layer(block, planes // 8, *rest, **options)


def batches(count: int, classes: int) -> list[Batch]:
    """Two images of 64 pixels each, with 0 to ROWS objects."""
    random = torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        corners = torch.rand(2, ROWS, 2, generator=random) * 32
        boxes = torch.cat([corners, corners + 8 + 20 * torch.rand(2, ROWS, 2, generator=random)], dim=-1)
        counts = torch.randint(ROWS + 1, (2,), generator=random)
        present = torch.arange(ROWS) < counts[:, None]
        labels = torch.randint(1, 1 + classes, (2, ROWS), generator=random) * present
        images = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8, generator=random)
        found.append(Batch(images, Targets(boxes * present[..., None], labels, counts)))
    return found


def compiled() -> int:
    counted = metrics.metric_data("CompileTime")
    return int(counted[0]) if counted else 0


def fallbacks() -> list[str]:
    """Operations that XLA leaves to the host."""
    return [name for name in metrics.counter_names() if name.startswith("aten::")]
