"""The detector of a checkpoint, or why there is none in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from detect_train.model import from_checkpoint
from utils import checkpoint
from utils.errors import InputError, one_line
from utils.label_files import is_class_name


def load(path: Path) -> dict[str, Any]:
    """A detector's checkpoint.

    Raises: CheckpointError when it is damaged; InputError when it is something else (which says so of a backbone),
    or its weights are not finite.
    """
    checkpoint.check(path)
    try:
        saved = checkpoint.load(path, "detector", "give a checkpoint of detect_train")
    except InputError:
        content = checkpoint.read(path)
        if content.get("kind") != "unet" and is_backbone(content):
            raise InputError(f"{path} is a backbone only: train a detector on it first (detect_train)") from None
        raise
    # torchvision drops boxes with NaN scores: such weights would be reported as AP 0
    if bad := [name for name, value in saved["model"].items() if not torch.isfinite(value).all()]:
        raise InputError(f"{path}: {len(bad)} tensors are not finite, first {bad[0]}: the training diverged")
    return saved


def build(path: str, saved: dict[str, Any]) -> tuple[nn.Module, tuple[str, ...]]:
    """The detector of a checkpoint and its classes. Raises: InputError when its parts contradict each other."""
    names, count = saved["classes"], saved["architecture"].get("num_classes")
    if not all(map(is_class_name, names)) or len(set(names)) != len(names) or count != len(names) + 1:
        raise InputError(f"{path}: {len(names)} distinct class names expected for num_classes={count}")
    try:
        return from_checkpoint(saved)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{path}: its weights are not those of the architecture it names: {one_line(error)}") from None


def is_backbone(content: dict[str, Any]) -> bool:
    """Whether a weights file holds a ResNet, under whatever names, and no detector around it."""
    names = [str(key) for part in (content, *content.values()) if isinstance(part, dict) for key in part]
    resnet = any(name.endswith("layer1.0.conv1.weight") for name in names)
    return resnet and not any("rpn." in name for name in names)
