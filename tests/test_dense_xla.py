"""The dense detector settles under XLA and computes what it does without it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import Dataset
from torchvision.models import resnet

from detect_train import dense, pyramid
from detect_train.inference import predict
from tests.test_dense import SMALL, small
from tests.thin_detector import COMPARED, GRAPHS, STEPS, Thin, batches, compiled, fallbacks, torch_xla

CHANNELS = 64  # a quarter
CLASSES = 3
LR = 1e-3


@pytest.fixture(autouse=True)
def thin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resnet, "resnet18", Thin)
    for module in (dense, pyramid):
        monkeypatch.setattr(module, "CHANNELS", CHANNELS)


class Squares(Dataset[Any]):
    """Five pictures of 48 x 64 in squares: the last batch of two is filled up."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, i: int) -> tuple[torch.Tensor, dict[str, Any]]:
        images = batches(i + 1, CLASSES)[i].images
        return images[0], {"image_id": i, "size": (48, 64)}


def train(device: torch.device, norm: str, steps: int) -> tuple[list[list[float]], list[int], dense.DenseDetector]:
    """Losses of each step, the graphs compiled by then, and the model."""
    model = small(norm=norm).to(device).train()
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=LR, momentum=0.9)
    losses, graphs = [], []
    for batch in batches(steps, CLASSES):
        found: Any = model(*batch.to(device))
        optimizer.zero_grad(set_to_none=True)
        torch.stack(list(found.values())).sum().backward()
        optimizer.step()
        if device.type == "xla":
            torch_xla.sync()
            graphs.append(compiled())
        losses.append(torch.stack([value.detach() for value in found.values()]))
    return [row.tolist() for row in torch.stack(losses).cpu()], graphs, model


def test_training_settles_and_computes_the_same() -> None:
    before = compiled()
    found, graphs, model = train(torch_xla.device(), "frozen", STEPS)
    assert graphs[1] == graphs[-1] <= before + GRAPHS
    assert fallbacks() == []
    wanted, _, _ = train(torch.device("cpu"), "frozen", COMPARED)
    for step, (ours, theirs) in enumerate(zip(found, wanted, strict=False)):
        assert ours == pytest.approx(theirs, rel=1e-5), step

    model.eval()
    before = compiled()
    for batch in batches(4, CLASSES):
        with torch.no_grad():
            regions: Any = model(batch.images.to(torch_xla.device()))  # type: ignore[union-attr]
        torch_xla.sync()
        assert compiled() - before == 1
    assert regions.boxes.shape == (2, SMALL["proposals_test"], 4)
    alone = small(norm="frozen")
    alone.load_state_dict({name: value.cpu() for name, value in model.state_dict().items()})
    with torch.no_grad():
        expected: Any = alone.eval()(batches(4, CLASSES)[3].images)
    torch.testing.assert_close(regions.scores.cpu(), expected.scores, rtol=1e-4, atol=1e-6)

    how: dict[str, Any] = {"batch_size": 2, "workers": 0, "precision": "float32"}
    rows = predict(model, Squares(), device=torch_xla.device(), **how)
    before = compiled()
    again = predict(model, Squares(), device=torch_xla.device(), **how)
    assert compiled() == before
    wanted_rows = predict(alone, Squares(), device=torch.device("cpu"), **how)
    assert rows.tolist() == again.tolist() and rows[:, 0].tolist() == wanted_rows[:, 0].tolist()
    torch.testing.assert_close(torch.tensor(rows[:, 5]), torch.tensor(wanted_rows[:, 5]), rtol=1e-4, atol=1e-6)
    assert fallbacks() == []


def test_statistics_that_are_trained_settle_too() -> None:
    before = compiled()
    _, graphs, _ = train(torch_xla.device(), "train", 6)
    assert graphs[1] == graphs[-1] <= before + GRAPHS
