"""MoCo against the paper: loss, queue, momentum, gradients."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from ssl_train.model import MoCo, accuracy, embed
from ssl_train.train import contrastive_loss
from utils.device import autocast
from utils.optim import sgd

CPU = torch.device("cpu")


def moco(*, queue: int = 10, momentum: float = 0.75) -> MoCo:
    """A small MoCo whose key encoder is already behind its query encoder."""
    torch.manual_seed(0)
    model = MoCo(arch="resnet18", dim=8, queue=queue, momentum=momentum, temperature=0.2)
    with torch.no_grad():
        for parameter in model.query_encoder.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def batch(size: int = 4, side: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(size, 3, side, side), torch.randn(size, 3, side, side)


def info_nce(q: np.ndarray, k: np.ndarray, queue: np.ndarray, temperature: float) -> float:
    """Equation 1 of the paper, one query and one key at a time."""
    losses = []
    for query, positive in zip(q, k, strict=True):
        query, positive = query / np.sqrt((query**2).sum()), positive / np.sqrt((positive**2).sum())
        above = np.exp((query * positive).sum() / temperature)
        below = above
        for negative in queue:
            below += np.exp((query * negative).sum() / temperature)
        losses.append(-np.log(above / below))
    return float(np.mean(losses))


def test_loss_is_the_paper_s() -> None:
    model, views = moco(), batch()
    reference = copy.deepcopy(model)
    with torch.no_grad():
        for key, query in zip(reference.key_encoder.parameters(), reference.query_encoder.parameters(), strict=True):
            key.copy_(0.75 * key + 0.25 * query)
        q = reference.query_encoder(views[0]).double().numpy()
        k = reference.key_encoder(views[1]).double().numpy()
    expected = info_nce(q, k, reference.queue.double().numpy(), 0.2)
    losses, _ = contrastive_loss(model, CPU)(views)
    assert losses["loss"].item() == pytest.approx(expected, rel=1e-5)
    assert losses["loss"].item() != pytest.approx(np.log(11), rel=1e-2), "all pairs alike would prove nothing"


def test_accuracy_counts_ranks_and_ties_against_the_positive_pair() -> None:
    first, second, fifth = [9, 1, 2, 3, 4, 5, 6], [5, 6, 1, 1, 1, 1, 1], [2, 3, 4, 5, 6, 1, 1]
    numbers = accuracy(torch.tensor([first, second, fifth, [1] * 7], dtype=torch.float))
    assert (numbers["top1"].item(), numbers["top5"].item()) == (25.0, 75.0)


def test_the_queue_is_a_ring_that_batches_need_not_divide() -> None:
    model = moco(queue=10)
    model.query_encoder, model.key_encoder = (nn.Sequential(nn.Flatten(), nn.Linear(3, 8)) for _ in range(2))
    expected, pointer = model.queue.clone(), 0
    assert torch.allclose(expected.norm(dim=1), torch.ones(10))
    for _ in range(6):
        before = model.queue.clone()
        query_images, key_images = batch(4, 1)
        logits, labels = model(query_images, key_images)
        keys = embed(model.key_encoder, key_images)
        for key in keys:
            expected[pointer] = key
            pointer = (pointer + 1) % 10
        assert torch.equal(model.queue, expected)
        assert model.pointer.item() == pointer
        queries = embed(model.query_encoder, query_images)
        assert torch.allclose(logits[:, 1:] * 0.2, queries @ before.T, atol=1e-6)
        assert torch.equal(labels, torch.zeros(4, dtype=torch.long))
    assert pointer == 4, "24 keys went twice round a ring of 10"


@pytest.mark.parametrize("momentum", [0.0, 0.75])
def test_momentum_update_moves_parameters_and_leaves_statistics(momentum: float) -> None:
    model = moco(momentum=momentum)
    before, query = copy.deepcopy(model.key_encoder), copy.deepcopy(model.query_encoder)
    for encoder in (query, model.query_encoder):
        encoder.get_buffer("bn1.running_mean").add_(1)
    model._update_key_encoder()
    for old, new, target in zip(before.parameters(), model.key_encoder.parameters(), query.parameters(), strict=True):
        torch.testing.assert_close(new, momentum * old + (1 - momentum) * target, rtol=1e-6, atol=1e-7)
        assert not torch.equal(old, target)
    for name, statistic in model.key_encoder.named_buffers():
        assert torch.equal(statistic, before.get_buffer(name)), name
    for name, parameter in model.query_encoder.named_parameters():
        assert torch.equal(parameter, query.get_parameter(name)), name


def test_only_the_query_encoder_is_trained() -> None:
    model = moco()
    optimizer = sgd(model, lr=0.1, momentum=0.9, weight_decay=0.0)
    losses, _ = contrastive_loss(model, CPU)(batch())
    losses["loss"].backward()
    assert all(parameter.grad is None for parameter in model.key_encoder.parameters())
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.query_encoder.parameters())  # type: ignore[union-attr]
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert trained == {id(parameter) for parameter in model.query_encoder.parameters()}


def test_bf16_stays_in_the_encoders() -> None:
    model = moco()
    with autocast(CPU, "bf16"):
        logits, _ = model(*batch())
    assert logits.dtype == model.queue.dtype == torch.float32
    assert torch.allclose(model.queue.norm(dim=1), torch.ones(10), atol=1e-6)


@pytest.mark.parametrize(("arch", "width"), [("resnet18", 512), ("resnet50", 2048)])
def test_the_head_has_two_layers_of_the_encoder_s_width(arch: str, width: int) -> None:
    head = MoCo(arch=arch, dim=8, queue=4, momentum=0.9, temperature=0.2).query_encoder.get_submodule("fc")
    assert [type(layer) for layer in head.children()] == [nn.Linear, nn.ReLU, nn.Linear]
    assert [tuple(parameter.shape) for parameter in head.parameters()] == [
        (width, width),
        (width,),
        (8, width),
        (8,),
    ]
