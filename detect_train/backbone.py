"""ResNet weights from elsewhere, put into a detector with an exact account of every tensor.

Read are
- a torchvision ResNet's state dict, as torchvision publishes them and as `ssl_train` exports `backbone.pth`;
- a checkpoint of facebookresearch/moco (`.pth.tar`), of which the query encoder is taken.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as brief

import torch
from torch import nn

from utils import checkpoint, log
from utils.errors import InputError

QUERY = re.compile(r"^(module\.)?encoder_q\.")
COUNTER = "num_batches_tracked"  # of BatchNorm; nothing here reads it; frozen layers and old files have none


@dataclass(frozen=True)
class Account:
    """Where every tensor of the file and of the backbone went, by name."""

    loaded: tuple[str, ...]
    missing: tuple[str, ...]  # in the backbone, not in the file
    unexpected: tuple[str, ...]  # in the file, unknown to the backbone
    misshapen: tuple[str, ...]  # in both, of different shapes
    dropped: tuple[str, ...]  # in the file, of no use here: classifier, counters, MoCo's key encoder and queue

    def __str__(self) -> str:
        return ", ".join(f"{len(names)} {kind}" for kind, names in vars(self).items())


def load_backbone(model: nn.Module, path: Path) -> Account:
    """Load `model.backbone.body`, a ResNet, from a weights file.

    Raises: InputError with the account and names unless every tensor of the backbone is in the file, in its
    shape, and none is left over (as when a resnet34 is given for a resnet18).
    """
    body = model.get_submodule("backbone.body")
    own = body.state_dict()
    given, dropped = _resnet(path)
    common = sorted(given.keys() & own.keys())
    fits = {name for name in common if given[name].shape == own[name].shape}
    left = sorted(given.keys() - own.keys())
    account = Account(
        loaded=tuple(sorted(fits)),
        missing=tuple(name for name in sorted(own.keys() - given.keys()) if not name.endswith(COUNTER)),
        unexpected=tuple(name for name in left if not name.endswith(COUNTER)),
        misshapen=tuple(name for name in common if name not in fits),
        dropped=tuple(sorted(dropped + [name for name in left if name.endswith(COUNTER)])),
    )
    wrong = {kind: getattr(account, kind) for kind in ("missing", "unexpected", "misshapen")}
    if any(wrong.values()):
        names = "; ".join(f"{kind}: {', '.join(names[:5])}" for kind, names in wrong.items() if names)
        raise InputError(f"backbone {path} does not fit the model ({account}): {names}; check model.backbone")
    body.load_state_dict({**own, **{name: given[name] for name in fits}})
    now = body.state_dict()
    if wrong_now := [name for name in common if not torch.equal(now[name].cpu(), given[name].to(now[name].dtype))]:
        raise InputError(f"backbone {path}: {', '.join(wrong_now[:5])}: not equal after loading; NaN in the file?")
    log.info(f"backbone {path}: {account}")
    return account


def _resnet(path: Path) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The ResNet's tensors in a file under torchvision's names, and the names of what is left aside."""
    content = checkpoint.read(path)
    if content.get("format") == checkpoint.FORMAT:
        remedy = {
            "moco": "give the backbone.pth exported from it",
            "detector": "give it as init or --resume",
            "unet": "give it as unet",
        }
        raise InputError(f"{path}: a {content['kind']} checkpoint, not a backbone; {remedy[content['kind']]}")
    nested = content.get("state_dict", content)
    tensors = {name: value for name, value in nested.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise InputError(f"backbone {path}: no tensors in it; its keys are {brief(list(content))}")
    dropped = []
    if any(QUERY.match(name) for name in tensors):
        dropped = [name for name in tensors if not QUERY.match(name)]
        tensors = {QUERY.sub("", name): value for name, value in tensors.items() if QUERY.match(name)}
    classifier = [name for name in tensors if name.startswith("fc.")]
    return {name: value for name, value in tensors.items() if name not in classifier}, dropped + classifier
