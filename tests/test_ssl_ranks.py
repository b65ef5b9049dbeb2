"""Pretraining on two real ranks: shuffling BN, the common queue, the common weights.

This file is the program of the ranks, too: what each saw is saved and compared in the test.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ssl_train.model import MoCo
from tests.ranks import torchrun
from tests.test_ssl_train import pretrain, write_images
from utils import checkpoint, dist, engine

SHARE, DIM = 8, 12


class Recorder(nn.Module):
    """An encoder, (n, 3, 2, 2) -> (n, 12), that remembers what it was given."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.weight = layer, nn.Parameter(torch.ones(1))
        self.seen: torch.Tensor | None = None

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen = images
        return self.layer(self.weight * images.flatten(1))


def all_images() -> torch.Tensor:
    return torch.randn(2 * SHARE, 3, 2, 2, generator=torch.Generator().manual_seed(3))


def with_encoder(layer: nn.Module) -> MoCo:
    torch.manual_seed(0)
    model = MoCo(arch="resnet18", dim=DIM, queue=20, momentum=0.9, temperature=0.5)
    model.query_encoder, model.key_encoder = Recorder(layer), Recorder(layer).requires_grad_(False)
    return model


def one_rank(folder: Path) -> None:
    """Pretrain, then record what this rank's part of a few steps was, while the ranks are still together."""
    report: dict[str, Any] = {}
    fit = engine.fit

    def observed(state: engine.TrainState, *arguments: Any, **options: Any) -> None:
        fit(state, *arguments, **options)
        report["trained"] = state.model.state_dict()
        report["plain"], report["bn"] = three_steps(nn.Identity()), three_steps(nn.BatchNorm1d(DIM))

    engine.fit = observed
    # a queue longer than all keys: its last rows, too, must be the same on both ranks
    report["loss"] = pretrain(folder / "run", folder / "images", "model.queue=30")["metrics"]["loss"]
    torch.save(report, folder / f"rank{os.environ['RANK']}.pth")


def three_steps(layer: nn.Module) -> dict[str, Any]:
    model, queues = with_encoder(layer), []
    mine = all_images().view(2, SHARE, 3, 2, 2)[dist.rank()]
    for step in range(3):
        torch.manual_seed(step * 2 + dist.rank())  # in training, too, the ranks draw different numbers
        logits, _ = model(mine, mine)
        queues.append(model.queue.clone())
    return {"seen": model.key_encoder.seen, "logits": logits.detach(), "queues": queues}


if __name__ == "__main__":
    one_rank(Path(sys.argv[1]))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("ranks")
    write_images(folder / "images")
    result = torchrun(2, "-m", "tests.test_ssl_ranks", folder)
    assert result.returncode == 0, result.stderr
    return folder, [checkpoint.read(folder / f"rank{rank}.pth") for rank in range(2)]


def unit(rows: torch.Tensor) -> torch.Tensor:
    return nn.functional.normalize(rows, dim=1)


def test_each_rank_encodes_images_of_the_other(ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    shares = [report["plain"]["seen"] for report in ranks[1]]
    same = [(share[:, None] == all_images()).flatten(2).all(2) for share in shares]  # (share, all images)
    places = [one.long().argmax(1).tolist() for one in same]
    assert sorted(places[0] + places[1]) == list(range(2 * SHARE)), "every image once"
    assert 0 < sum(place >= SHARE for place in places[0]) < SHARE


def test_keys_come_back_in_order(ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    keys = unit(all_images().flatten(1))
    for rank, report in enumerate(ranks[1]):
        own = keys[rank * SHARE : (rank + 1) * SHARE]
        for step, queue in enumerate(report["plain"]["queues"]):
            assert torch.equal(queue.roll(-2 * SHARE * step, 0)[: 2 * SHARE], keys), "rank 0's, then rank 1's"
        torch.testing.assert_close(report["plain"]["logits"][:, 0], (own * own).sum(1) / 0.5)


def test_statistics_are_those_of_the_shuffled_shares(ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    shares = [report["bn"]["seen"].flatten(1) for report in ranks[1]]
    bn, images = nn.BatchNorm1d(DIM), all_images().flatten(1)
    order = (images[:, None] == torch.cat(shares)).all(2).long().argmax(1)
    keys = torch.cat([unit(bn(share)) for share in shares])[order]
    unshuffled = torch.cat([unit(bn(share)) for share in images.split(SHARE)])
    assert not torch.allclose(keys, unshuffled, atol=1e-2)
    third = ranks[1][0]["bn"]["queues"][2].roll(-2 * SHARE * 2, 0)[: 2 * SHARE]
    torch.testing.assert_close(third, keys)


def test_ranks_end_with_the_same_model(ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, (first, second) = ranks
    statistics = 0
    for name, tensor in first["trained"].items():
        if "running" in name:
            statistics += not torch.equal(tensor, second["trained"][name])
        else:
            assert torch.equal(tensor, second["trained"][name]), name
    assert statistics > 0, "each rank saw other images"
    assert first["loss"] == second["loss"]
    saved = checkpoint.load(folder / "run" / "checkpoints" / "checkpoint_0001.pth", "moco", "?")
    assert saved["conditions"]["world_size"] == 2
    for name, tensor in saved["model"].items():
        assert torch.equal(tensor, first["trained"][name]), f"{name} is rank 0's"
