"""Both parts of the two-stage detector settle under XLA and compute what they do without it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from detect_train.two_stage import model, parts, unet
from detect_train.two_stage.classifier import Noise
from detect_train.two_stage.config import Iterations
from tests.test_two_stage import SMALL
from tests.thin_detector import COMPARED, GRAPHS, STEPS, Thin, batches, compiled, fallbacks, torch_xla
from utils import device as devices
from utils.engine import TrainState
from utils.optim import set_lr

LR = 1e-4  # with ten times as much the last digits that differ are the fifth ones after 20 steps
PLAN = Iterations(pre=4, main=STEPS - 4)


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
    for batch in batches(steps, classes=2):
        set_lr(state.optimizer, rate(0, state.step))
        noise = [Noise.draw(batch.targets, SMALL["proposals"], state.step).to(device)] if part == "classify" else []
        found = stepped(*batch.to(device), *noise)
        torch.stack(list(found.values())).sum().backward()
        devices.step(state.optimizer, device)
        state.optimizer.zero_grad(set_to_none=True)
        state.step += 1
        losses.append(torch.stack([value.detach() for value in found.values()]))
        graphs.append(compiled() if device.type == "xla" else 0)
    return [row.tolist() for row in losses], graphs, stepped


@pytest.mark.parametrize("part", ["unet", "classify"])
def test_a_part_settles_and_computes_the_same(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unet, "get_model", Thin)
    before = compiled()
    found, graphs, detector = train(part, torch_xla.device(), PLAN.total)
    assert fallbacks() == []
    assert graphs[1] == graphs[PLAN.pre - 1], "held, with another learning rate in each step"
    assert graphs[PLAN.pre] == graphs[-1] <= before + GRAPHS
    wanted, _, _ = train(part, torch.device("cpu"), COMPARED)
    for step, (ours, theirs) in enumerate(zip(found[:COMPARED], wanted, strict=True)):
        assert ours == pytest.approx(theirs, rel=1e-5), step
    if part == "classify":
        detector.eval()
        before = compiled()
        for batch in batches(4, classes=2):
            regions = detector(batch.to(torch_xla.device()).images)
            torch_xla.sync()
        assert compiled() - before == 1
        assert regions.boxes.shape == (2, SMALL["proposals"], 4)
        assert fallbacks() == []
