"""The detector's layers do what the configuration says, and weights from elsewhere arrive whole."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

from detect_train.backbone import load_backbone
from detect_train.heads import sort_by_level
from detect_train.model import Detector, build, from_checkpoint
from detect_train.targets import pad
from utils import checkpoint
from utils.engine import TrainState
from utils.errors import InputError

SMALL: dict[str, Any] = {
    "num_classes": 3, "backbone": "resnet18", "trainable_layers": 5, "norm": "train", "min_size": (64,),
    "max_size": 96, "anchor_sizes": (8, 16, 32, 64, 96), "proposals_train": 50, "proposals_test": 50,
    "box_batch_size": 32, "score_threshold": 0.0, "detections_per_image": 10,
}  # fmt: skip


def small(**changes: Any) -> Detector:
    torch.manual_seed(0)
    return build(**{**SMALL, **changes})


def picture(height: int = 64, width: int = 64) -> torch.Tensor:
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(1))


def target(*boxes: list[float]) -> dict[str, torch.Tensor]:
    return {
        "boxes": torch.tensor(boxes).reshape(-1, 4),
        "labels": torch.arange(1, len(boxes) + 1),
    }


def train_once(model: Detector) -> dict[str, torch.Tensor]:
    losses = model.train()([picture(), picture(48, 80)], pad([target([4, 4, 40, 40], [8, 8, 60, 30]), target()]))
    sum(losses.values()).backward()
    return losses


@pytest.mark.parametrize("norm", ["frozen", "train", "sync"])
def test_norm_stays_what_it_says_in_training(norm: str) -> None:
    model = small(norm=norm)
    before = {name: value.clone() for name, value in model.backbone.body.named_buffers()}
    train_once(model)
    moved = [name for name, value in model.backbone.body.named_buffers() if not torch.equal(value, before[name])]
    trained = [name for name, parameter in model.backbone.body.named_parameters() if parameter.ndim == 1]
    if norm == "frozen":
        assert moved == [] and trained == [] and len(before) == 4 * 20
    else:
        assert len(moved) == len(before) == 3 * 20 and len(trained) == 2 * 20


def test_frozen_layers_keep_their_weights() -> None:
    model = small(norm="frozen", trainable_layers=2)
    train_once(model)
    graded = {name.split(".")[0] for name, value in model.backbone.body.named_parameters() if value.grad is not None}
    assert graded == {"layer3", "layer4"}


def test_boxes_are_pooled_from_the_level_of_their_size() -> None:
    """Equation 1 of the FPN paper: a box of 224 pixels belongs to level 2 of 0..3, half of that to 1."""
    model = small()
    levels = OrderedDict(
        (name, torch.full((1, 256, 512 // stride, 512 // stride), float(number)))
        for number, (name, stride) in enumerate({"0": 4, "1": 8, "2": 16, "3": 32, "pool": 64}.items())
    )
    boxes = torch.tensor([[[10.0, 10, 10 + side, 10 + side] for side in (30, 120, 230, 460)]])
    pooled = model.roi_heads.box_roi_pool(levels, boxes, sort_by_level(boxes, torch.ones(1, 4, dtype=torch.bool)))
    assert pooled.shape == (4, 256, 7, 7)
    assert pooled.mean(dim=(1, 2, 3)).tolist() == [0, 1, 2, 3]


def test_an_image_without_boxes_is_a_negative() -> None:
    losses = small().train()([picture()], pad([target()]))
    assert {name: bool(loss.isfinite()) for name, loss in losses.items()} == {
        "loss_classifier": True, "loss_box_reg": True, "loss_objectness": True, "loss_rpn_box_reg": True,
    }  # fmt: skip
    assert losses["loss_box_reg"] == losses["loss_rpn_box_reg"] == 0 and losses["loss_classifier"] > 0


def test_uint8_images_are_the_same_as_floats() -> None:
    model = small().eval()
    image = (picture(50, 70) * 255).to(torch.uint8)
    as_integers, as_floats = model([image])[0], model([image.float() / 255])[0]
    assert len(as_integers["boxes"]) == 10
    for name, value in as_floats.items():
        assert torch.equal(as_integers[name], value), name


def test_images_are_normalised_once() -> None:
    model = small().eval()
    seen: list[torch.Tensor] = []
    model.backbone.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    model([torch.stack([torch.full((64, 64), value) for value in (0.485, 0.456, 0.406)])])
    assert seen[0].abs().max() < 1e-6


def test_geometry_is_float32_under_bf16_autocast() -> None:
    model = small(min_size=(320,), max_size=320, detections_per_image=100).eval()
    image = picture(320, 320)
    anchors: list[torch.Tensor] = []
    proposals: list[torch.Tensor] = []
    model.rpn.anchor_generator.register_forward_hook(lambda _, given, out: anchors.append(out))
    model.rpn.register_forward_hook(lambda _, given, out: proposals.append(out[0].boxes[0]))
    model([image])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model([image])[0]
    assert torch.equal(anchors[0], anchors[1])
    for boxes in (proposals[1], found["boxes"]):
        assert boxes.dtype == torch.float32
        inside = boxes[(boxes > 1) & (boxes < 319)]
        on_grid = (inside == inside.bfloat16().float()).float().mean()
        assert len(inside) > 10 and on_grid < 0.2


def test_a_checkpoint_alone_is_the_detector(tmp_path: Path) -> None:
    model = small(norm="frozen").eval()
    state = TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1))
    content = checkpoint.payload(
        "detector",
        state=state,
        architecture={**SMALL, "norm": "frozen"},
        config={},
        conditions={},
        classes=["cat", "dog"],
    )
    checkpoint.write(tmp_path / "detector.pth", content)
    again, classes = from_checkpoint(checkpoint.read(tmp_path / "detector.pth"))
    assert classes == ("cat", "dog")
    for name, value in model([picture()])[0].items():
        assert torch.equal(again.eval()([picture()])[0][name], value), name


def resnet(name: str = "resnet18") -> nn.Module:
    """A ResNet whose every tensor is unlike a new detector's."""
    torch.manual_seed(5)
    model = torchvision.models.get_model(name, weights=None)
    for tensor in model.state_dict().values():
        if tensor.ndim == 1:
            tensor.uniform_(0.2, 0.4)
        elif tensor.ndim == 0:
            tensor.fill_(7)
    return model


def moco(encoder: nn.Module) -> dict[str, Any]:
    """The layout of facebookresearch/moco's `.pth.tar`."""
    state = encoder.state_dict()
    tensors = {f"module.encoder_{which}.{name}": value for which in "qk" for name, value in state.items()}
    tensors = {name: value + ("encoder_k" in name) for name, value in tensors.items()}
    head = {"module.encoder_q.fc.0.weight": torch.rand(4, 4), "module.encoder_q.fc.2.bias": torch.rand(4)}
    queue = {"module.queue": torch.rand(8, 4), "module.queue_ptr": torch.zeros(1, dtype=torch.long)}
    return {
        "epoch": 100,
        "arch": "resnet18",
        "state_dict": {**tensors, **head, **queue},
        "optimizer": {"state": {}},
    }


def without_classifier(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in state.items() if not name.startswith("fc.")}


FORMATS = {
    "torchvision": (lambda: resnet().state_dict(), 2),
    "exported": (lambda: without_classifier(resnet().state_dict()), 0),
    "moco": (
        lambda: moco(resnet()),
        122 + 2 + 4,
    ),  # key encoder, its own fc and the head's 2, queue and pointer, ...
}


@pytest.mark.parametrize("norm", ["frozen", "train"])
@pytest.mark.parametrize("layout", FORMATS)
def test_backbone_weights_arrive_whole(tmp_path: Path, layout: str, norm: str) -> None:
    content, dropped = FORMATS[layout][0](), FORMATS[layout][1]
    torch.save(content, tmp_path / "weights.pth")
    model = small(norm=norm)
    account = load_backbone(model, tmp_path / "weights.pth")
    expected = without_classifier(resnet().state_dict())
    loaded = model.backbone.body.state_dict()
    assert set(account.loaded) == set(loaded) <= set(expected)
    assert len(loaded) == (100 if norm == "frozen" else 120)
    for name, value in loaded.items():
        assert torch.equal(value, expected[name]), name
    assert account.missing == account.unexpected == account.misshapen == ()
    assert len(account.dropped) == dropped + (20 if norm == "frozen" else 0)


def test_an_old_file_without_counters_is_complete(tmp_path: Path) -> None:
    state = {name: value for name, value in resnet().state_dict().items() if "num_batches" not in name}
    torch.save(state, tmp_path / "resnet18-5c106cde.pth")
    account = load_backbone(small(), tmp_path / "resnet18-5c106cde.pth")
    assert len(account.loaded) == 100 and account.missing == ()


def broken(kind: str) -> Any:
    state = without_classifier(resnet().state_dict())
    if kind == "missing":
        del state["layer3.1.bn2.running_var"]
    elif kind == "misshapen":
        state["conv1.weight"] = torch.rand(64, 3, 3, 3)
    elif kind == "deeper":
        state = without_classifier(resnet("resnet34").state_dict())
    elif kind == "other names":
        state = {f"backbone.{name}": value for name, value in state.items()}
    elif kind == "nan":
        state["conv1.weight"][0] = float("nan")
    elif kind == "no tensors":
        return {"epoch": 3}
    elif kind == "list":
        return [1, 2]
    elif kind == "ours":
        return {"format": checkpoint.FORMAT, "kind": "moco", "model": state}
    return state


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            "missing",
            r"99 loaded, 1 missing, 0 unexpected, 0 misshapen, 20 dropped\): missing: layer3.1.bn2.running",
        ),
        ("misshapen", r"1 misshapen, 20 dropped\): misshapen: conv1.weight;"),
        ("deeper", r"0 missing, 80 unexpected, .*unexpected: layer1.2.bn1.bias"),
        ("other names", r"0 loaded, 100 missing, 100 unexpected"),
        ("nan", r"conv1.weight: not equal after loading"),
        ("no tensors", r"no tensors in it; its keys are \['epoch'\]"),
        ("list", "not a state dict"),
        ("ours", "a moco checkpoint, not a backbone; give the backbone.pth"),
    ],
)
def test_a_backbone_that_does_not_fit_is_refused_by_name(tmp_path: Path, kind: str, message: str) -> None:
    torch.save(broken(kind), tmp_path / "weights.pth")
    with pytest.raises(InputError, match=rf"weights\.pth.*{message}"):
        load_backbone(small(norm="frozen"), tmp_path / "weights.pth")
