"""Predictions are one array, whatever the number of ranks. As a program: the ranks of that test."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from detect_train.inference import measure, predict
from tests.ranks import torchrun
from tests.test_coco import random_case
from utils import coco, dist
from utils.errors import DivergedError
from utils.paths import RunDir

# Not in order, and not exact in float32.
IDS = (30005, 2**24 + 1, 30001, 2**40 + 3, 7, 30002, 30004)
SIZES = ((64, 64), (48, 96), (64, 50), (100, 60), (64, 64), (30, 90), (80, 80))  # height, width


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As torchrun's ranks have: on the CPU the last digits depend on it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Images(Dataset[Any]):
    """Seven noise images of different sizes."""

    def __init__(self, length: int = len(IDS)) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[torch.Tensor, dict[str, Any]]:
        image = torch.rand(3, *SIZES[index], generator=torch.Generator().manual_seed(index))
        return image, {"image_id": IDS[index]}


def detector(score_thresh: float = 0.0) -> FasterRCNN:
    torch.manual_seed(0)
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=5)
    return FasterRCNN(
        backbone, 4, min_size=64, max_size=96, box_score_thresh=score_thresh, box_detections_per_img=9,
        rpn_pre_nms_top_n_test=50, rpn_post_nms_top_n_test=20,
    )  # fmt: skip


def detect(model: FasterRCNN, length: int = len(IDS), batch_size: int = 2, workers: int = 0) -> np.ndarray:
    cpu = torch.device("cpu")
    return predict(model, Images(length), batch_size=batch_size, workers=workers, device=cpu, precision="float32")


def cases() -> dict[str, np.ndarray]:
    """Seven images in four batches, one batch only, and a detector that finds nothing."""
    model = detector()
    nothing = detect(detector(score_thresh=1.1))
    return {"seven": detect(model), "one": detect(model, length=1), "nothing": nothing}


def overflowing(layer: str) -> FasterRCNN:
    """Every weight is finite, what `layer` computes is not."""
    model = detector(score_thresh=0.05)
    torch.nn.init.constant_(model.get_submodule(layer).weight, 3e38)
    assert all(value.isfinite().all() for value in model.state_dict().values())
    return model


def test_rows_are_the_model_s_answers_in_original_pixels_sorted_by_image() -> None:
    model = detector()
    rows = detect(model, batch_size=1, workers=1)
    assert rows.dtype == np.float64
    assert sorted(set(rows[:, 0])) == sorted(IDS)
    expected = []
    model.eval()
    for index in np.argsort(IDS):
        with torch.no_grad():
            (output,) = model([Images()[int(index)][0]])
        assert output["boxes"][:, 2].max() <= SIZES[index][1] + 1e-3
        assert output["boxes"][:, 3].max() <= SIZES[index][0] + 1e-3
        boxes, labels, scores = output["boxes"].tolist(), output["labels"].tolist(), output["scores"].tolist()
        for box, label, score in zip(boxes, labels, scores, strict=True):
            expected.append([IDS[index], *box, score, label])
    assert rows.tolist() == expected


@pytest.mark.parametrize("training", [True, False])
def test_evaluates_in_eval_mode_and_puts_the_mode_back(training: bool) -> None:
    model = detector().train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    detect(model, length=2)
    assert all(module.training is training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    if training:  # and what predicting left in the model does not disturb training
        boxes = {"boxes": torch.tensor([[5.0, 5, 40, 40]]), "labels": torch.tensor([1])}
        sum(model([Images()[0][0]], [boxes]).values()).backward()


def test_an_image_seen_twice_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "IDS", (5, 5, 6, 7, 8, 9, 10))
    with pytest.raises(AssertionError, match="7"):
        detect(detector())


@pytest.mark.parametrize(
    "layer",
    [
        "backbone.body.conv1",
        "rpn.head.cls_logits",
        "rpn.head.bbox_pred",
        "roi_heads.box_predictor.cls_score",
        "roi_heads.box_predictor.bbox_pred",
    ],
)
def test_scores_and_boxes_that_are_not_finite_are_an_error(layer: str) -> None:
    model = overflowing(layer)
    with pytest.raises(DivergedError, match="scores or boxes are not finite"):
        detect(model, length=3)
    assert not any(module._forward_hooks for module in model.modules())


def test_two_ranks_return_the_array_of_one(tmp_path: Path) -> None:
    answer = torchrun(2, "-m", "tests.test_inference", tmp_path)
    assert answer.returncode == 0, answer.stderr
    expected = cases()
    for name, alone in expected.items():
        for rank in range(2):
            together = np.load(tmp_path / f"{rank}_{name}.npy")
            assert together.shape == alone.shape, (name, rank)
            np.testing.assert_array_equal(together, alone, err_msg=f"{name} on rank {rank}")
    assert expected["nothing"].shape == (0, 7)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    stats = coco.evaluate(*random_case(seed=1)).stats
    assert first == {"stats": stats, "whole": True, "error": "the detector's scores or boxes are not finite"}
    assert second == {**first, "whole": False}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    with dist.session("cpu", RunDir(folder), timeout=60):
        assert dist.size() == 2
        for name, rows in cases().items():
            np.save(folder / f"{dist.rank()}_{name}.npy", rows)
        stats, result = measure(*random_case(seed=1), torch.device("cpu"))
        answers = {"stats": stats, "whole": bool(result)}
        try:  # on one rank only: both end, with the same error
            detect(overflowing("backbone.body.conv1") if dist.rank() == 1 else detector())
        except DivergedError as error:
            answers["error"] = str(error)
        (folder / f"{dist.rank()}.json").write_text(json.dumps(answers))
