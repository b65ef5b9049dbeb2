"""Evaluation the way of torchvision's references/detection, written from what it does.

It goes through the whole data set for its ground truth, decoding each image; makes a dict of each detection; loads the
results of each batch; merges; accumulates.
"""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchvision.transforms.functional import pil_to_tensor

from utils.labels import LabelIndex

Outputs = Sequence[dict[str, torch.Tensor]]


class Photos:
    """Image i decoded, with its target. `photos` are the JPEG files, used over and over; the labels lie in memory."""

    def __init__(self, index: LabelIndex, photos: Sequence[bytes]) -> None:
        self.index, self.photos = index, photos

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, dict[str, Any]]:
        image = pil_to_tensor(Image.open(io.BytesIO(self.photos[i % len(self.photos)])).convert("RGB"))
        boxes, labels = self.index.target(i)
        return image.float() / 255, {
            "image_id": int(self.index.ids[i]),
            "boxes": torch.from_numpy(boxes).float(),
            "labels": torch.from_numpy(labels),
            "area": torch.from_numpy((boxes[:, 2:] - boxes[:, :2]).prod(axis=1)),
            "iscrowd": torch.zeros(len(labels), dtype=torch.int64),
        }


def numbers(dataset: Photos, outputs: Outputs, batch_size: int) -> list[float]:
    """COCO's twelve numbers of `outputs`, one a detector's answer to each image of `dataset`."""
    truth = ground_truth(dataset)
    evaluator = COCOeval(truth, iouType="bbox")
    classes, areas = len(evaluator.params.catIds), len(evaluator.params.areaRng)
    ids: list[int] = []
    matches = []
    for start in range(0, len(dataset), batch_size):
        images = dataset.index.ids[start : start + batch_size].tolist()
        answers = results(dict(zip(images, outputs[start : start + batch_size], strict=True)))
        with contextlib.redirect_stdout(io.StringIO()):
            evaluator.cocoDt = truth.loadRes(answers)
            evaluator.params.imgIds = images
            evaluator.evaluate()
        ids += images
        matches.append(np.asarray(evaluator.evalImgs).reshape(classes, areas, len(images)))
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator.params.imgIds, where = np.unique(ids, return_index=True)
        evaluator.evalImgs = list(np.concatenate(matches, axis=2)[..., where].flatten())
        evaluator._paramsEval = copy.deepcopy(evaluator.params)
        evaluator.accumulate()
        evaluator.summarize()
    return evaluator.stats.tolist()


def ground_truth(dataset: Photos) -> COCO:
    """The data set as pycocotools takes one, from each of its examples."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for i in range(len(dataset)):
        image, target = dataset[i]
        images.append({"id": target["image_id"], "height": image.shape[-2], "width": image.shape[-1]})
        boxes = target["boxes"].clone()
        boxes[:, 2:] -= boxes[:, :2]
        columns = (boxes.tolist(), *(target[name].tolist() for name in ("labels", "area", "iscrowd")))
        for box, label, area, crowd in zip(*columns, strict=True):
            annotation = {"id": len(annotations) + 1, "image_id": target["image_id"], "category_id": label}
            annotations.append(annotation | {"bbox": box, "area": area, "iscrowd": crowd})
    labels = sorted({annotation["category_id"] for annotation in annotations})
    result = COCO()
    result.dataset = {"images": images, "annotations": annotations, "categories": [{"id": label} for label in labels]}
    with contextlib.redirect_stdout(io.StringIO()):
        result.createIndex()
    return result


def results(answers: dict[int, dict[str, torch.Tensor]]) -> list[dict[str, Any]]:
    """A batch's answers by image id, as a dict for each detection."""
    rows = []
    for image, output in answers.items():
        boxes = output["boxes"].clone()
        boxes[:, 2:] -= boxes[:, :2]
        columns = zip(boxes.tolist(), output["scores"].tolist(), output["labels"].tolist(), strict=True)
        rows += [{"image_id": image, "category_id": label, "bbox": box, "score": s} for box, s, label in columns]
    return rows
