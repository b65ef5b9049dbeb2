"""A ResNet with a feature pyramid (Lin et al., 2017) of strides 8 to 128, without an operation that XLA lacks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torchvision.models.detection.backbone_utils import BackboneWithFPN, resnet_fpn_backbone
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelP6P7

from detect_train.norms import NORMS

STRIDES = (8, 16, 32, 64, 128)  # pixels
LAYERS = [2, 3, 4]  # of the ResNet, for the first three; two strided convolutions make the others
CHANNELS = 256


class Pyramid(FeaturePyramidNetwork):
    """torchvision's, but for how a level is enlarged: it has the gradient of `F.interpolate` computed by the host."""

    def forward(self, x: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Each level's features (B, C, H, W), the finest first; a level has half the rows and columns of the finer."""
        merged = [block(level) for block, level in zip(self.inner_blocks, x.values(), strict=True)]
        for finer in reversed(range(len(merged) - 1)):
            merged[finer] = merged[finer] + doubled(merged[finer + 1])
        levels = [block(level) for block, level in zip(self.layer_blocks, merged, strict=True)]
        levels, names = self.extra_blocks(levels, list(x.values()), list(x))
        return dict(zip(names, levels, strict=True))


def doubled(features: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) -> (B, C, 2H, 2W), each value four times."""
    wide = features[:, :, :, None, :, None].expand(-1, -1, -1, 2, -1, 2)
    return wide.flatten(4, 5).flatten(2, 3)


def resnet_pyramid(backbone: str, norm: str, trainable_layers: int) -> BackboneWithFPN:
    """With random weights; nothing is downloaded. Arguments as in `config.Model`."""
    layers = {"returned_layers": LAYERS, "trainable_layers": trainable_layers}
    model = resnet_fpn_backbone(backbone_name=backbone, weights=None, norm_layer=NORMS[norm], **layers)
    widths = [block[0].in_channels for block in model.fpn.inner_blocks]
    model.fpn = Pyramid(widths, CHANNELS, extra_blocks=LastLevelP6P7(CHANNELS, CHANNELS))
    return model
