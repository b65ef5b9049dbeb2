"""MoCo against the paper: loss, queue, momentum, gradients; and what its step asks of the device."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from bench.operators import Operators
from ssl_train.data import Batch, to_device
from ssl_train.model import BatchNorm, MoCo, accuracy
from ssl_train.train import contrastive_loss
from utils.device import autocast, place
from utils.optim import sgd

CPU = torch.device("cpu")


def moco(*, queue: int = 10, momentum: float = 0.75, bn_groups: int = 1) -> MoCo:
    """A small MoCo whose key encoder is already behind its query encoder."""
    torch.manual_seed(0)
    model = MoCo(arch="resnet18", dim=8, queue=queue, momentum=momentum, temperature=0.2, bn_groups=bn_groups)
    with torch.no_grad():
        for parameter in model.query_encoder.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def batch(size: int = 4, side: int = 32) -> Batch:
    views = torch.randint(256, (2, size, side, side, 3), dtype=torch.uint8)
    return Batch(views[0], views[1], torch.arange(size), side)


def unit(rows: torch.Tensor) -> torch.Tensor:
    return nn.functional.normalize(rows, dim=1)


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
    model, drawn = moco(), batch()
    views = to_device(drawn, CPU)
    reference = copy.deepcopy(model)
    with torch.no_grad():
        for key, query in zip(reference.key_encoder.parameters(), reference.query_encoder.parameters(), strict=True):
            key.copy_(0.75 * key + 0.25 * query)
        q = reference.query_encoder(views[0]).double().numpy()
        k = reference.key_encoder(views[1]).double().numpy()
    expected = info_nce(q, k, reference.queue.double().numpy(), 0.2)
    losses, _ = contrastive_loss(model, CPU)(drawn)
    assert losses["loss"].item() == pytest.approx(expected, rel=1e-5)
    assert losses["loss"].item() != pytest.approx(np.log(11), rel=1e-2), "all pairs alike would prove nothing"


def test_accuracy_counts_ranks_and_ties_against_the_positive_pair() -> None:
    first, second, fifth = [9, 1, 2, 3, 4, 5, 6], [5, 6, 1, 1, 1, 1, 1], [2, 3, 4, 5, 6, 1, 1]
    numbers = accuracy(torch.tensor([first, second, fifth, [1] * 7], dtype=torch.float))
    assert (numbers["top1"].item(), numbers["top5"].item()) == (25.0, 75.0)


def test_the_queue_is_a_ring_that_batches_need_not_divide() -> None:
    model = moco(queue=10)
    model.query_encoder, model.key_encoder = (
        nn.Sequential(BatchNorm(3, 0.1).eval(), nn.Flatten(), nn.Linear(3, 8)) for _ in range(2)
    )
    expected, pointer = model.queue.clone(), 0
    assert torch.allclose(expected.norm(dim=1), torch.ones(10))
    for _ in range(6):
        before = model.queue.clone()
        query_images, key_images = torch.randn(2, 4, 3, 1, 1)
        order = torch.randperm(4)
        logits, labels = model(query_images, key_images[order], order)
        keys = unit(model.key_encoder(key_images))
        for key in keys:
            expected[pointer] = key
            pointer = (pointer + 1) % 10
        assert torch.equal(model.queue, expected)
        assert model.pointer.item() == pointer
        queries = unit(model.query_encoder(query_images))
        assert torch.allclose(logits[:, 0] * 0.2, (queries * keys).sum(1), atol=1e-6)
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
        logits, _ = model(*to_device(batch(), CPU), torch.arange(4))
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


def test_groups_have_statistics_of_their_own_and_are_forgotten_as_one_batch_is() -> None:
    model, images = moco(bn_groups=2), torch.randn(8, 3, 32, 32)
    halves, order = images.split(4), torch.arange(8)
    single = copy.deepcopy(model.query_encoder)
    q = torch.cat([unit(single(half)) for half in halves])
    assert not torch.allclose(q, unit(single(images)), atol=1e-2)
    model(images, images, order)
    expected = torch.zeros(64)
    for half in halves:
        expected += (1 - 0.9**0.5) * (single.get_submodule("conv1")(half).mean((0, 2, 3)) - expected)
    running = model.query_encoder.get_buffer("bn1.running_mean")
    torch.testing.assert_close(running, expected)
    torch.testing.assert_close(
        model.query_encoder.get_buffer("bn1.running_var").mean(), running.new_tensor(1), rtol=1, atol=0
    )
    assert torch.equal(model._embed(model.query_encoder, images), q)
    counts = [value for name, value in model.state_dict().items() if name.endswith("num_batches_tracked")]
    assert len(counts) == 40 and all(count == 2 for count in counts)


def test_weights_have_the_names_of_torchvision_s() -> None:
    ours = moco().query_encoder.state_dict()
    theirs = torchvision.models.resnet18().state_dict()
    assert [name for name in ours if not name.startswith("fc.")] == [n for n in theirs if not n.startswith("fc.")]


def test_a_step_of_resnet50_asks_for_few_operators_and_waits_for_none() -> None:
    torch.manual_seed(0)
    model = place(MoCo(arch="resnet50", dim=128, queue=64, momentum=0.999, temperature=0.2), CPU)
    optimizer, loss_fn = sgd(model, lr=0.01, momentum=0.9, weight_decay=1e-4), contrastive_loss(model, CPU)

    def step() -> None:
        losses, _ = loss_fn(drawn)
        optimizer.zero_grad(set_to_none=True)
        losses["loss"].backward()
        optimizer.step()

    drawn = batch(8)
    step()  # the optimizer's state appears
    with Operators() as asked:
        step()
    assert asked.calls <= 700, asked.by_name
    assert asked.by_name["convolution_backward"] == 53, "the backward pass is seen"
    assert not asked.waits


def test_the_count_sees_what_waits() -> None:
    scores = torch.rand(4)
    for work in (
        scores.tolist,
        scores[0].item,
        scores.cpu,
        scores.nonzero,
        lambda: scores[scores > 2],
        lambda: int(scores.sum()),
    ):
        with Operators() as asked:
            work()
        assert asked.waits.total() == 1, work
