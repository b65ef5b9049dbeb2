"""Export the pretrained query encoder as the state dict of a torchvision ResNet without `fc`.

python -m ssl_train.export CHECKPOINT OUT.pth

resnet = torchvision.models.resnet50()
resnet.fc = torch.nn.Identity()
resnet.load_state_dict(torch.load("OUT.pth", weights_only=True))
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torchvision

from utils import checkpoint
from utils.errors import InputError, cli

PREFIX = "query_encoder."
REMEDY = "give a checkpoint of ssl_train.train"


def backbone(weights: Mapping[str, torch.Tensor], arch: str) -> dict[str, torch.Tensor]:
    """From a MoCo model's state dict, that of torchvision's `arch` without `fc`: all of it, nothing else.

    Raises: InputError naming the keys that are missing, left over, or of another shape.
    """
    found = {key.removeprefix(PREFIX): value for key, value in weights.items() if key.startswith(PREFIX)}
    found = {key: value for key, value in found.items() if not key.startswith("fc.")}
    with torch.device("meta"):  # names and shapes only
        model = torchvision.models.get_model(arch, weights=None)
    wanted = {key: value.shape for key, value in model.state_dict().items() if not key.startswith("fc.")}
    wrong = {
        "missing": wanted.keys() - found.keys(),
        "left over": found.keys() - wanted.keys(),
        "of another shape": {key for key in wanted.keys() & found.keys() if wanted[key] != found[key].shape},
    }
    if any(wrong.values()):
        lists = "; ".join(f"{what}: {', '.join(sorted(keys))}" for what, keys in wrong.items() if keys)
        raise InputError(f"the query encoder is not a whole {arch}: {lists}")
    return found


def export(source: Path, target: Path) -> None:
    """Write `target` from the pretraining checkpoint `source`. Raises: InputError if that is not whole."""
    saved = checkpoint.load(source, "moco", REMEDY)
    checkpoint.write(target, backbone(saved["model"], saved["architecture"]["arch"]))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="ssl_train.export", description="Export the query encoder.")
    parser.add_argument("checkpoint", type=Path, help="checkpoint of ssl_train.train")
    parser.add_argument("target", type=Path, metavar="OUT.pth", help="file to write")
    arguments = parser.parse_args(argv)
    export(arguments.checkpoint, arguments.target)
    print(arguments.target)


if __name__ == "__main__":
    cli(main)
