"""Both parts of the two-stage detector settle under XLA and compute what they do without it."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torchvision.models import resnet

from detect_train.targets import Batch, Targets
from detect_train.two_stage import model, parts, unet
from detect_train.two_stage.classifier import Noise
from detect_train.two_stage.config import Iterations
from tests.test_two_stage import SMALL
from utils import device as devices
from utils.engine import TrainState
from utils.optim import set_lr

# Before torch_xla is imported: XLA compiles for the CPU in a twentieth of the time, to code of the same arithmetic.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
pytest.importorskip("torch_xla", reason="torch_xla has an environment of its own: make install-tpu")

import torch_xla
import torch_xla.debug.metrics as metrics

ROWS = 4
LR = 1e-4  # with ten times as much the last digits that differ are the fifth ones after 20 steps
PLAN = Iterations(pre=4, main=16)


def batches() -> list[Batch]:
    """One for each step, with 0 to ROWS objects an image."""
    torch.manual_seed(0)
    found = []
    for _ in range(PLAN.total):
        corners = torch.rand(2, ROWS, 2) * 32
        boxes = torch.cat([corners, corners + 8 + 20 * torch.rand(2, ROWS, 2)], dim=-1)
        counts = torch.randint(ROWS + 1, (2,))
        present = torch.arange(ROWS) < counts[:, None]
        labels = torch.randint(1, 3, (2, ROWS)) * present
        images = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8)
        found.append(Batch(images, Targets(boxes * present[..., None], labels, counts)))
    return found


def train(part: str, device: torch.device, steps: int) -> tuple[list[list[float]], list[int], Any]:
    """Losses of each step, the graphs compiled by then, and the model."""
    torch.manual_seed(0)
    detector = model.build(**{key: value for key, value in SMALL.items() if key != "head"})
    trained: Any = detector.unet if part == "unet" else detector.classifier
    stepped = detector if part == "classify" else detector.unet.requires_grad_(True)
    stepped.to(device).train()
    state = TrainState(stepped, parts.optimizer(trained, lr=LR, momentum=0.9, weight_decay=1e-4))
    parts.hold_backbone(state, PLAN.pre)
    rate = parts.schedule(LR, 2, PLAN)
    losses, graphs = [], []
    for batch in batches()[:steps]:
        set_lr(state.optimizer, rate(0, state.step))
        noise = [Noise.draw(batch.targets, SMALL["proposals"], state.step).to(device)] if part == "classify" else []
        found = stepped(*batch.to(device), *noise)
        torch.stack(list(found.values())).sum().backward()
        devices.step(state.optimizer, device)
        state.optimizer.zero_grad(set_to_none=True)
        state.step += 1
        losses.append(torch.stack([value.detach() for value in found.values()]))
        graphs.append(metrics.metric_data("CompileTime")[0] if device.type == "xla" else 0)
    return [row.tolist() for row in losses], graphs, stepped


class Thin(resnet.ResNet):
    """As few layers as a ResNet can have, of an eighth of the channels."""

    def __init__(self, name: str, weights: None) -> None:
        super().__init__(resnet.BasicBlock, [1, 1, 1, 1])
        self.fc = torch.nn.Linear(512 // 8, 1)

    def _make_layer(self, block: Any, planes: int, *rest: Any, **options: Any) -> torch.nn.Sequential:
        return super()._make_layer(block, planes // 8, *rest, **options)


@pytest.mark.parametrize("part", ["unet", "classify"])
def test_a_part_settles_and_computes_the_same(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unet, "get_model", Thin)
    metrics.clear_all()
    found, graphs, detector = train(part, torch_xla.device(), PLAN.total)
    fallbacks = [name for name in metrics.counter_names() if name.startswith("aten::")]
    assert not fallbacks
    assert graphs[1] == graphs[PLAN.pre - 1], "held, with another learning rate in each step"
    assert graphs[PLAN.pre] == graphs[-1] <= 3
    wanted, _, _ = train(part, torch.device("cpu"), 20)
    for step, (ours, theirs) in enumerate(zip(found[:20], wanted, strict=True)):
        assert ours == pytest.approx(theirs, rel=1e-5), step
    if part == "classify":
        detector.eval()
        before = metrics.metric_data("CompileTime")[0]
        for batch in batches()[:4]:
            regions = detector(batch.to(torch_xla.device()).images)
            torch_xla.sync()
        assert metrics.metric_data("CompileTime")[0] - before == 1
        assert regions.boxes.shape == (2, SMALL["proposals"], 4)
        assert not [name for name in metrics.counter_names() if name.startswith("aten::")]
