"""COCO's numbers are pycocotools' own with either evaluator, and input that pycocotools would misread is refused."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from utils import coco
from utils.errors import InputError
from utils.labels import LabelIndex
from utils.tree import Folder

CLASSES = ("cat", "dog", "eel", "fox")
both = pytest.mark.parametrize("evaluator", ["hotcoco", "pycocotools"])


def make_index(counts: list[int], boxes: np.ndarray, labels: list[int]) -> LabelIndex:
    ids = np.arange(30001, 30001 + len(counts), dtype=np.int64)
    return LabelIndex(
        tree=Folder(Path(__file__).parent),
        split="validation",
        classes=CLASSES,
        ids=ids,
        numbers=np.arange(len(ids), dtype=np.int64),
        sizes=np.full((len(ids), 2), 640, dtype=np.int64),
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        boxes=np.asarray(boxes, dtype=np.float64).reshape(-1, 4),
        labels=np.array(labels, dtype=np.int64),
        problems=(),
    )


def random_case(seed: int) -> tuple[LabelIndex, np.ndarray]:
    """Boxes of all sizes, none a `fox`; detections near them with many ties, over 100 in one image."""
    random = np.random.default_rng(seed)
    counts = [0, 3, 7, 0, 1, 12]
    corner = random.uniform(0, 300, (sum(counts), 2))
    boxes = np.hstack([corner, corner + random.choice([9.0, 32.0, 70.0, 96.0, 200.5], (len(corner), 2))])
    index = make_index(counts, boxes, random.integers(1, 4, len(boxes)).tolist())
    rows = []
    for image, number in zip(index.ids, (5, 130, 20, 0, 8, 60), strict=True):
        near = boxes[random.integers(0, len(boxes), number)] + random.normal(0, 3, (number, 4))
        near[:, 2:] = np.maximum(near[:, 2:], near[:, :2])
        score = random.integers(1, 12, number) / 12  # many equal
        rows.append(np.column_stack([np.full(number, image), near, score, random.integers(1, 5, number)]))
    exact = np.column_stack([np.repeat(index.ids, counts), boxes, np.full(len(boxes), 0.5), index.labels])
    return index, np.vstack([*rows, exact[::2]])


def plain_pycocotools(index: LabelIndex, rows: np.ndarray) -> tuple[list[float], str]:
    """The same question asked in the documented way, with dicts."""
    images = np.repeat(index.ids, np.diff(index.offsets))

    def bbox(box: np.ndarray) -> list[float]:
        return [float(box[0]), float(box[1]), float(box[2] - box[0]), float(box[3] - box[1])]

    truth = COCO()
    truth.dataset = {
        "images": [{"id": int(i)} for i in index.ids],
        "categories": [{"id": k + 1, "name": name} for k, name in enumerate(index.classes)],
        "annotations": [
            {"id": n + 1, "image_id": int(images[n]), "category_id": int(index.labels[n]), "bbox": bbox(box),
             "area": bbox(box)[2] * bbox(box)[3], "iscrowd": 0}
            for n, box in enumerate(index.boxes)
        ],
    }  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        results = [
            {"image_id": int(r[0]), "bbox": bbox(r[1:5]), "score": float(r[5]), "category_id": int(r[6])} for r in rows
        ]
        evaluator = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        evaluator.summarize()
    return list(evaluator.stats), printed.getvalue()


@pytest.mark.parametrize("seed", range(8))
@both
def test_numbers_and_lines_are_those_of_pycocotools(
    evaluator: coco.Evaluator, seed: int, capfd: pytest.CaptureFixture[str]
) -> None:
    index, rows = random_case(seed)
    stats, printed = plain_pycocotools(index, rows)
    capfd.readouterr()
    result = coco.evaluate(index, rows, evaluator)
    assert capfd.readouterr() == ("", "")
    assert list(result.stats) == list(coco.METRICS)
    assert list(result.stats.values()) == stats  # bit for bit
    assert result.table + "\n" == printed
    assert len(result.table.split("\n")) == 12
    assert 0 < result.stats["AP"] < 1


@both
def test_ap_per_class_is_the_ap_of_that_class_alone(evaluator: coco.Evaluator) -> None:
    index, rows = random_case(0)
    per_class = coco.evaluate(index, rows, evaluator).per_class
    assert list(per_class) == list(CLASSES)
    assert per_class["fox"] == -1  # detected, but nowhere in the ground truth
    measured = [value for value in per_class.values() if value != -1]
    assert np.mean(measured) == pytest.approx(coco.evaluate(index, rows, evaluator).stats["AP"], abs=1e-12)
    dogs = coco.evaluate(index, rows[rows[:, 6] == 2], evaluator).per_class
    assert dogs == {"cat": 0.0, "dog": per_class["dog"], "eel": 0.0, "fox": -1.0}


def truth_as_detections(index: LabelIndex) -> np.ndarray:
    images = np.repeat(index.ids, np.diff(index.offsets))
    return np.column_stack([images, index.boxes, np.linspace(1, 0.5, len(images)), index.labels])


@both
def test_perfect_detections_score_one_and_none_score_zero(evaluator: coco.Evaluator) -> None:
    boxes = np.array([[0, 0, 20, 20], [0, 0, 60, 60], [50, 50, 200, 200.0]])
    index = make_index([1, 0, 2], boxes, [1, 2, 3])
    perfect = coco.evaluate(index, truth_as_detections(index), evaluator).stats
    assert perfect == pytest.approx(dict.fromkeys(coco.METRICS, 1.0), abs=1e-12)
    assert set(coco.evaluate(index, np.zeros((0, 7)), evaluator).stats.values()) == {0.0}


@both
def test_without_ground_truth_of_a_size_the_number_is_minus_one_even_without_detections(
    evaluator: coco.Evaluator,
) -> None:
    index = make_index([1], np.array([[0, 0, 20, 20.0]]), [1])
    for rows in (np.zeros((0, 7)), truth_as_detections(index)):
        result = coco.evaluate(index, rows, evaluator)
        assert {name for name, value in result.stats.items() if value == -1} == {"APm", "APl", "ARm", "ARl"}
        assert [name for name, value in result.per_class.items() if value == -1] == ["dog", "eel", "fox"]
    assert coco.show(-1.0) == "n/a"
    assert coco.show(0.12345) == "0.123"


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        (1, np.nan, r"image_id 30001, x1 nan.*score 0\.75.*class dog.*not finite"),
        (3, np.inf, "x2 inf.*not finite"),
        (5, np.nan, "score nan.*not finite"),
        (0, 7, "image_id 7,.*no such image id in .*tests/validation"),
        (0, 30002, "image_id 30002,.*no such image id"),
        (6, 0, "label 0: no such label; known: 1..4"),
        (6, 5, "label 5: no such label"),
        (6, 1.5, "label 1.5: no such label"),
        (3, 1, "image_id 30001.*class dog.*inverted"),
    ],
)
def test_rows_that_mean_nothing_are_refused(column: int, value: float, message: str) -> None:
    index = make_index([3], np.array([[0, 0, 20, 20], [10, 0, 60, 60], [50, 50, 200, 200.0]]), [1, 2, 3])
    rows = truth_as_detections(index)
    rows[1, column] = value
    with pytest.raises(InputError, match=f"^detection row 1: .*{message}.*; 1 such"):
        coco.evaluate(index, rows)
