"""Batch normalisation of the backbone, by what becomes of its statistics."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torchvision.ops import FrozenBatchNorm2d


class FrozenNorm(FrozenBatchNorm2d):
    """torchvision's, which in bf16 is one operation that leaves the features bf16: theirs become float32.

    In float32 theirs keeps less for the backward pass.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype == torch.float32:
            return super().forward(x)
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


# Layers, not modes: `.train()` cannot thaw a frozen one. On one rank SyncBatchNorm is BatchNorm2d.
NORMS = {"frozen": FrozenNorm, "sync": nn.SyncBatchNorm, "train": nn.BatchNorm2d}
