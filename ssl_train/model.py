"""Momentum Contrast with the projection head of MoCo v2 (arXiv:1911.05722, arXiv:2003.04297)."""

from __future__ import annotations

import copy
from functools import cached_property, partial

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from utils import dist

FORGET = 0.1  # of BatchNorm's running statistics a step: torch's default


class MoCo(nn.Module):
    """A query encoder that is trained, a key encoder that follows it, and a queue of keys.

    Args:
        arch: a torchvision ResNet, `resnet18` to `resnet152`.
        dim: length of queries and keys.
        queue: how many keys to contrast with, K in the paper. No multiple of the batch is needed.
        momentum: m in the paper: the key encoder becomes m * key + (1 - m) * query each step.
        temperature: T in the paper.
        bn_groups: how many GPUs each rank stands for: that many parts of its batch are encoded one after another,
            each with BatchNorm statistics of its own. The running statistics take all parts, about equally, and
            forget per step what those of one GPU do.
    """

    queue: Tensor
    pointer: Tensor

    def __init__(
        self, *, arch: str, dim: int, queue: int, momentum: float, temperature: float, bn_groups: int = 1
    ) -> None:
        super().__init__()
        self.momentum, self.temperature, self.bn_groups = momentum, temperature, bn_groups
        self.query_encoder = encoder(arch, dim, bn_groups)
        self.key_encoder = copy.deepcopy(self.query_encoder).requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(queue, dim), dim=1))
        self.register_buffer("pointer", torch.tensor(0))  # the oldest key: the next one is written there

    def forward(self, query_images: Tensor, key_images: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
        """Algorithm 1 of the paper up to the loss, which is the cross entropy of what is returned.

        Shuffling BN: a rank, and each of its `bn_groups`, encodes keys of other images than queries, so that the
        BatchNorm statistics of a query and its key come from different images; from the same ones they would give
        the pair away. The loader deals the images out so, and no image travels between ranks.

        Args:
            query_images: (n, 3, h, w), a random view of each of this rank's images.
            key_images: (n, 3, h, w), another view of images `order[rank * n : (rank + 1) * n]` of the global batch.
            order: (N,) int64, the same on every rank, a permutation of the N = n * ranks images of the global
                batch, whose first n are rank 0's queries.

        Returns:
            logits (n, 1 + K), the positive pair first, and labels (n,), all 0.
        """
        q = self._embed(self.query_encoder, query_images)  # (n, dim)
        with torch.no_grad():
            self._update_key_encoder()
            shuffled = dist.gather(self._embed(self.key_encoder, key_images))  # (N, dim)
            keys = torch.empty_like(shuffled).index_copy_(0, order, shuffled)  # (N, dim), as the queries' images
            k = keys.view(dist.size(), -1, keys.shape[1])[dist.rank()]  # (n, dim)
            torch._foreach_add_([layer.batches for layer in self._norms], self.bn_groups)
        with torch.autocast(q.device.type, enabled=False):
            positive = (q * k).sum(dim=1, keepdim=True)  # (n, 1)
            # cloned, which is 1 to 2 % of ResNet-18's step on a CPU core and less of any other: the backward pass
            # needs this queue, which is overwritten below
            negative = q @ self.queue.clone().T  # (n, K)
            logits = torch.cat([positive, negative], dim=1) / self.temperature  # (n, 1 + K)
        labels = torch.zeros(len(logits), dtype=torch.long, device=logits.device)  # (n,)
        self._enqueue(keys)
        return logits, labels

    def _embed(self, encoder: nn.Module, images: Tensor) -> Tensor:
        """(n, 3, h, w) -> (n, dim), float32, of length 1; each of the `bn_groups` by itself."""
        parts = images.split(len(images) // self.bn_groups)
        return F.normalize(torch.cat([encoder(part) for part in parts]).float(), dim=1)

    @torch.no_grad()
    def _update_key_encoder(self) -> None:
        """The parameters only: as published, the key encoder's BatchNorm keeps statistics of its own."""
        keys, queries = self._pairs
        torch._foreach_lerp_(keys, queries, 1 - self.momentum)

    @cached_property
    def _pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        """The key encoder's parameters and the query encoder's. Kept: to find them takes longer than to update."""
        return list(self.key_encoder.parameters()), list(self.query_encoder.parameters())

    @cached_property
    def _norms(self) -> list[BatchNorm]:
        return [layer for layer in self.modules() if isinstance(layer, BatchNorm)]

    @torch.no_grad()
    def _enqueue(self, keys: Tensor) -> None:
        """Replace the oldest N rows of the ring, going on at its start when its end is reached; N <= K."""
        positions = (self.pointer + torch.arange(len(keys), device=keys.device)) % len(self.queue)
        self.queue.index_copy_(0, positions, keys)
        self.pointer.add_(len(keys)).remainder_(len(self.queue))


class BatchNorm(nn.BatchNorm2d):
    """torch's layer, whose batches MoCo counts for all layers at once: one launch instead of a hundred a step."""

    def __init__(self, width: int, forget: float) -> None:
        super().__init__(width, momentum=forget)
        self.forget = forget

    @property
    def batches(self) -> Tensor:
        return self.get_buffer("num_batches_tracked")

    def forward(self, x: Tensor) -> Tensor:
        running = self.running_mean, self.running_var
        return F.batch_norm(x, *running, self.weight, self.bias, self.training, self.forget, self.eps)


def encoder(arch: str, dim: int, bn_groups: int) -> nn.Module:
    """A torchvision ResNet whose `fc` is MoCo v2's two-layer head: (n, 3, h, w) -> (n, dim)."""
    norm = partial(BatchNorm, forget=1 - (1 - FORGET) ** (1 / bn_groups))
    resnet = torchvision.models.get_model(arch, weights=None, num_classes=dim, norm_layer=norm)
    width = resnet.fc.in_features
    resnet.fc = nn.Sequential(nn.Linear(width, width), nn.ReLU(), resnet.fc)
    return resnet


@torch.no_grad()
def accuracy(logits: Tensor) -> dict[str, Tensor]:
    """Percent of (n, 1 + K) logits' rows whose positive pair, column 0, is the greatest or in the first five.

    An equal negative counts as greater, so that a collapsed encoder, whose logits are all the same, scores 0.
    """
    ahead = (logits[:, 1:] >= logits[:, :1]).sum(dim=1)  # (n,)
    return {"top1": 100 * (ahead < 1).float().mean(), "top5": 100 * (ahead < 5).float().mean()}
