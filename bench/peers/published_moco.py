"""MoCo v2's training step as facebookresearch/moco publishes it: a peer, written from arXiv:1911.05722's Algorithm 1.

What it does as that repository does, and `ssl_train.model` does not: images are exchanged and shuffled between ranks,
the momentum update is a loop over parameters, the queue has a key a column and its pointer is read by the host, keys
are gathered twice, and the loss is read in every step.
"""

from __future__ import annotations

import copy

import torch
import torchvision
from torch import Tensor, distributed, nn
from torch.nn import functional as F

Shuffled = tuple[Tensor, Tensor]


class PublishedMoCo(nn.Module):
    """Args as those of `ssl_train.model.MoCo`; the queue must be a multiple of the batch."""

    queue: Tensor
    queue_ptr: Tensor

    def __init__(self, *, arch: str, dim: int, queue: int, momentum: float, temperature: float) -> None:
        super().__init__()
        self.momentum, self.temperature = momentum, temperature
        self.encoder_q = torchvision.models.get_model(arch, weights=None, num_classes=dim)
        width = self.encoder_q.fc.in_features
        self.encoder_q.fc = nn.Sequential(nn.Linear(width, width), nn.ReLU(), self.encoder_q.fc)
        self.encoder_k = copy.deepcopy(self.encoder_q).requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(dim, queue), dim=0))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    def forward(self, im_q: Tensor, im_k: Tensor) -> tuple[Tensor, Tensor]:
        q = F.normalize(self.encoder_q(im_q), dim=1)
        with torch.no_grad():
            momentum_loop(list(self.encoder_k.parameters()), list(self.encoder_q.parameters()), self.momentum)
            images, back = shuffle(im_k)
            k = unshuffle(F.normalize(self.encoder_k(images), dim=1), back)
        positive = torch.einsum("nc,nc->n", q, k).unsqueeze(-1)
        negative = torch.einsum("nc,ck->nk", q, self.queue.clone().detach())
        logits = torch.cat([positive, negative], dim=1) / self.temperature
        labels = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
        self.enqueue(k)
        return logits, labels

    @torch.no_grad()
    def enqueue(self, k: Tensor) -> None:
        keys = gathered(k)
        pointer = int(self.queue_ptr)
        self.queue[:, pointer : pointer + len(keys)] = keys.T
        self.queue_ptr[0] = (pointer + len(keys)) % self.queue.shape[1]


@torch.no_grad()
def momentum_loop(keys: list[Tensor], queries: list[Tensor], momentum: float) -> None:
    for key, query in zip(keys, queries, strict=True):
        key.data = key.data * momentum + query.data * (1.0 - momentum)


def gathered(rows: Tensor) -> Tensor:
    """The rows of all ranks, in rank order."""
    if not distributed.is_initialized():
        return rows
    parts = [torch.ones_like(rows) for _ in range(distributed.get_world_size())]
    distributed.all_gather(parts, rows)
    return torch.cat(parts)


@torch.no_grad()
def shuffle(images: Tensor) -> Shuffled:
    """This rank's part of all ranks' images in a random order, and the way back."""
    everyone = gathered(images)
    order = torch.randperm(len(everyone), device=images.device)
    rank = 0
    if distributed.is_initialized():
        distributed.broadcast(order, src=0)
        rank = distributed.get_rank()
    return everyone[order.view(-1, len(images))[rank]], torch.argsort(order)


@torch.no_grad()
def unshuffle(keys: Tensor, back: Tensor) -> Tensor:
    """The keys of this rank's own images."""
    rank = distributed.get_rank() if distributed.is_initialized() else 0
    return gathered(keys)[back.view(-1, len(keys))[rank]]


def train_step(
    model: PublishedMoCo, optimizer: torch.optim.Optimizer, im_q: Tensor, im_k: Tensor
) -> tuple[float, float, float]:
    """One step: the loss and the accuracies in percent, read as the published loop does."""
    logits, labels = model(im_q, im_k)
    loss = F.cross_entropy(logits, labels)
    with torch.no_grad():
        hits = logits.topk(5, dim=1).indices.T.eq(labels)
        first, fifth = (hits[:k].reshape(-1).float().sum() * (100.0 / len(labels)) for k in (1, 5))
    numbers = loss.item(), first.item(), fifth.item()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return numbers
