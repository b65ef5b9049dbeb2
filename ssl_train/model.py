"""Momentum Contrast with the projection head of MoCo v2 (arXiv:1911.05722, arXiv:2003.04297)."""

from __future__ import annotations

import copy

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from utils import dist


class MoCo(nn.Module):
    """A query encoder that is trained, a key encoder that follows it, and a queue of keys.

    Args:
        arch: a torchvision ResNet, `resnet18` to `resnet152`.
        dim: length of queries and keys.
        queue: how many keys to contrast with, K in the paper. No multiple of the batch is needed.
        momentum: m in the paper: the key encoder becomes m * key + (1 - m) * query each step.
        temperature: T in the paper.
    """

    queue: Tensor
    pointer: Tensor

    def __init__(self, *, arch: str, dim: int, queue: int, momentum: float, temperature: float) -> None:
        super().__init__()
        self.momentum, self.temperature = momentum, temperature
        self.query_encoder = encoder(arch, dim)
        self.key_encoder = copy.deepcopy(self.query_encoder).requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(queue, dim), dim=1))
        self.register_buffer("pointer", torch.tensor(0))  # the oldest key: the next one is written there

    def forward(self, query_images: Tensor, key_images: Tensor) -> tuple[Tensor, Tensor]:
        """Algorithm 1 of the paper up to the loss, which is the cross entropy of what is returned.

        Args:
            query_images: (n, 3, h, w), a random view of each of this rank's images.
            key_images: (n, 3, h, w), another view of each.

        Returns:
            logits (n, 1 + K), the positive pair first, and labels (n,), all 0.
        """
        q = embed(self.query_encoder, query_images)  # (n, dim)
        with torch.no_grad():
            self._update_key_encoder()
            keys = self._keys(key_images)  # (N, dim): of all ranks' images
            k = keys.view(dist.size(), -1, keys.shape[1])[dist.rank()]  # (n, dim)
        with torch.autocast(q.device.type, enabled=False):
            positive = (q * k).sum(dim=1, keepdim=True)  # (n, 1)
            # cloned: the backward pass needs this queue, which is overwritten below
            negative = q @ self.queue.clone().T  # (n, K)
            logits = torch.cat([positive, negative], dim=1) / self.temperature  # (n, 1 + K)
        labels = torch.zeros(len(logits), dtype=torch.long, device=logits.device)  # (n,)
        self._enqueue(keys)
        return logits, labels

    @torch.no_grad()
    def _update_key_encoder(self) -> None:
        """The parameters only: as published, the key encoder's BatchNorm keeps statistics of its own."""
        keys: list[Tensor] = list(self.key_encoder.parameters())
        queries: list[Tensor] = list(self.query_encoder.parameters())
        torch._foreach_lerp_(keys, queries, 1 - self.momentum)

    @torch.no_grad()
    def _keys(self, images: Tensor) -> Tensor:
        """(n, 3, h, w) of each rank -> (N, dim), the keys of all ranks' images, in rank order.

        Shuffling BN: each rank encodes a random share of all the images, so that the BatchNorm statistics
        of a query and its key come from different images; from the same ones they would give the pair away.
        With one rank there is nothing to shuffle.
        """
        if dist.size() == 1:
            return embed(self.key_encoder, images)
        everyone = dist.gather_rows(images)  # (N, 3, h, w)
        # (N,), rank 0's: the ranks' random numbers differ
        order = dist.broadcast(torch.randperm(len(everyone), device=images.device))
        mine = order.view(dist.size(), -1)[dist.rank()]  # (n,)
        shuffled = dist.gather_rows(embed(self.key_encoder, everyone[mine]))  # (N, dim), of everyone[order]
        return shuffled[order.argsort()]

    @torch.no_grad()
    def _enqueue(self, keys: Tensor) -> None:
        """Replace the oldest N rows of the ring, going on at its start when its end is reached; N <= K."""
        positions = (self.pointer + torch.arange(len(keys), device=keys.device)) % len(self.queue)
        self.queue.index_copy_(0, positions, keys)
        self.pointer.add_(len(keys)).remainder_(len(self.queue))


def encoder(arch: str, dim: int) -> nn.Module:
    """A torchvision ResNet whose `fc` is MoCo v2's two-layer head: (n, 3, h, w) -> (n, dim)."""
    resnet = torchvision.models.get_model(arch, weights=None, num_classes=dim)
    width = resnet.fc.in_features
    resnet.fc = nn.Sequential(nn.Linear(width, width), nn.ReLU(), resnet.fc)
    return resnet


def embed(encoder: nn.Module, images: Tensor) -> Tensor:
    """(n, 3, h, w) -> (n, dim), float32, of length 1."""
    return F.normalize(encoder(images).float(), dim=1)


@torch.no_grad()
def accuracy(logits: Tensor) -> dict[str, Tensor]:
    """Percent of (n, 1 + K) logits' rows whose positive pair, column 0, is the greatest or in the first five.

    An equal negative counts as greater, so that a collapsed encoder, whose logits are all the same, scores 0.
    """
    ahead = (logits[:, 1:] >= logits[:, :1]).sum(dim=1)  # (n,)
    return {"top1": 100 * (ahead < 1).float().mean(), "top5": 100 * (ahead < 5).float().mean()}
