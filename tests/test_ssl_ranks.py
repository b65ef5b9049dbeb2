"""Pretraining on two real ranks: the published algorithm's keys, the common queue, the common weights.

This file is the program of the ranks, too: what each saw is saved and compared in the test.
"""

from __future__ import annotations

import copy
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as groups

from ssl_train.batches import ShuffledBatches
from ssl_train.data import Share, Views, to_device
from ssl_train.model import MoCo
from tests.ranks import torchrun
from tests.test_ssl_train import pretrain, write_images
from utils import checkpoint, dist, engine, image_cache
from utils.device import place
from utils.tree import Folder

N, K, STEPS = 12, 20, 4  # images of all ranks, keys in the queue: the second step's go round its end
CPU = torch.device("cpu")


def data(folder: Path) -> Views:
    source = image_cache.of(Folder(folder / "images"), None, 0)
    return Views(
        source, seed=5, backend="opencv", image_size=32, crop_scale=(0.2, 1.0),
        jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8, grayscale_p=0.2, blur_p=0.5, blur_sigma=(0.1, 2.0),
    )  # fmt: skip


def gathered(rows: Tensor) -> Tensor:
    parts = [torch.empty_like(rows) for _ in range(groups.get_world_size())]
    groups.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


@torch.no_grad()
def published_keys(key_encoder: nn.Module, images: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """Shuffling BN as published, with all images on the wire: what this rank encodes, and its own images' keys.

    "We shuffle the sample order in the current mini-batch before distributing it among GPUs (and shuffle back after
    encoding)": arXiv:1911.05722, section 3.3.
    """
    rank, world = groups.get_rank(), groups.get_world_size()
    everyone = gathered(images)
    mine = everyone[order].view(world, len(images), *images.shape[1:])[rank]
    keys = nn.functional.normalize(key_encoder(mine), dim=1)
    back = torch.argsort(order).view(world, len(images))[rank]
    return mine, gathered(keys)[back]


def several_steps(folder: Path, bn_groups: int) -> list[dict[str, Tensor]]:
    """Steps of ours on real batches, and on ranks beside each the published way to its keys and its queue."""
    torch.manual_seed(0)
    model = MoCo(arch="resnet18", dim=16, queue=K, momentum=0.9, temperature=0.5, bn_groups=bn_groups)
    with torch.no_grad():
        for parameter in model.query_encoder.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    place(model, CPU)
    views, batches = data(folder), ShuffledBatches(14, N, 5, bn_groups)
    queue, pointer, steps = model.queue.T.clone(), 0, []  # (dim, K), as published
    for epoch in range(STEPS):
        batches.go_to(epoch, 0)
        share = next(iter(batches))
        batch = views.__getitems__(share)
        torch.manual_seed(epoch * 2 + dist.rank())  # in training, too, the ranks draw different numbers
        query_images, key_images = to_device(batch, CPU)
        before = model.queue.clone()
        logits, _ = model(query_images, key_images, batch.order)
        seen = {"order": batch.order, "ours": key_images, "logits": logits.detach(), "queue": model.queue.clone()}
        if dist.size() > 1:
            encoder = copy.deepcopy(model.key_encoder)
            _, own = to_device(views.__getitems__(Share(epoch, share.query, share.query, share.order)), CPU)
            seen["theirs"], k = published_keys(encoder, own, batch.order)
            unshuffled = published_keys(encoder, own, torch.arange(N))[1]
            for key in gathered(k):
                queue[:, pointer] = key
                pointer = (pointer + 1) % K
            q = nn.functional.normalize(model.query_encoder(query_images), dim=1).detach()
            negative = torch.einsum("nc,ck->nk", q, before.T)
            seen["their logits"] = torch.cat([torch.einsum("nc,nc->n", q, k)[:, None], negative], dim=1) / 0.5
            seen |= {"k": k, "unshuffled": unshuffled, "their queue": queue.T.clone()}
        steps.append(seen)
    return steps


def one_rank(folder: Path) -> None:
    """Pretrain, then take several steps of which everything is recorded, while the ranks are still together."""
    report: dict[str, Any] = {}
    fit = engine.fit

    def observed(state: engine.TrainState, *arguments: Any, **options: Any) -> None:
        fit(state, *arguments, **options)
        report["trained"] = state.model.state_dict()
        report["steps"] = several_steps(folder, bn_groups=1)

    engine.fit = observed
    # a queue longer than all keys: its last rows, too, must be the same on both ranks
    report["loss"] = pretrain(folder / "run", folder / "images", "model.queue=30")["metrics"]["loss"]
    torch.save(report, folder / f"rank{os.environ['RANK']}.pth")


if __name__ == "__main__":
    one_rank(Path(sys.argv[1]))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("ranks")
    write_images(folder / "images")
    result = torchrun(2, "-m", "tests.test_ssl_ranks", folder)
    assert result.returncode == 0, result.stderr
    return folder, [checkpoint.read(folder / f"rank{rank}.pth") for rank in range(2)]


def test_keys_and_queue_are_the_published_algorithm_s(ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    for rank, report in enumerate(ranks[1]):
        orders = [tuple(step["order"].tolist()) for step in report["steps"]]
        assert len(set(orders)) == STEPS
        for order, step in zip(orders, report["steps"], strict=True):
            mine = order[rank * N // 2 : (rank + 1) * N // 2]
            assert 0 < sum(place // (N // 2) == rank for place in mine) < N // 2, "own images and the other's"
            assert torch.equal(step["ours"], step["theirs"]), "the loader makes what the ranks would exchange"
            assert torch.equal(step["queue"], step["their queue"])
            assert not torch.allclose(step["k"], step["unshuffled"], atol=1e-3), "statistics are of the shuffled parts"
            torch.testing.assert_close(step["logits"], step["their logits"])


def test_two_groups_of_one_rank_are_two_ranks(ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, (first, second) = ranks
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = several_steps(folder, bn_groups=2)
    torch.set_num_threads(threads)
    for step, one, other in zip(alone, first["steps"], second["steps"], strict=True):
        assert torch.equal(step["ours"], torch.cat([one["ours"], other["ours"]]))
        assert torch.equal(step["queue"], one["queue"])
        torch.testing.assert_close(step["logits"], torch.cat([one["logits"], other["logits"]]))


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
