"""hotcoco and pycocotools give the same curves bit for bit, on sets made to tell them apart."""

from __future__ import annotations

import sys
import tracemalloc
from collections.abc import Iterator

import numpy as np
import pytest

from tests.test_coco import random_case
from utils import coco, coco_backends, log
from utils.coco_backends import Curves, Truth, curves
from utils.errors import InputError

LIBRARIES: tuple[coco_backends.Library, ...] = ("hotcoco", "pycocotools")
CLASSES = 6  # the last has no ground truth, the first no detection
LARGE_IDS = (0, 2**31 + 5, 2**40 + 3, 10**15 - 1)
SIDES = (0.0, 1.0, 9.0, 31.999, 32.0, 32.001, 64.0, 95.999, 96.0, 96.001, 200.5)  # 32 and 96 part small, medium, large
SEEDS = range(48)


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    coco_backends.library.cache_clear()
    yield
    coco_backends.library.cache_clear()


def adversarial(seed: int) -> tuple[Truth, np.ndarray]:
    """Ten images and their detections, both in random order."""
    random = np.random.default_rng(seed)
    ids = random.choice([*range(1, 400), *LARGE_IDS], 10, replace=False).astype(np.int64)
    counts = random.integers(0, 9, len(ids))
    counts[:2] = 0
    images = ids.repeat(counts)
    sides = random.choice(SIDES, (len(images), 2))
    square = random.random(len(images)) < 0.6
    sides[square, 1] = sides[square, 0]
    corner = random.uniform(0, 300, sides.shape)
    whole = random.random(len(images)) < 0.5  # areas come out exact
    corner[whole] = corner[whole].round()
    boxes = np.hstack([corner, corner + sides])
    crowd = random.random(len(images)) < 0.15
    truth = Truth(ids, CLASSES, images, random.integers(1, CLASSES, len(images)), boxes, crowd)
    found = [detected(random, truth, int(image)) for image in ids]
    return truth, random.permutation(np.vstack(found))


def detected(random: np.random.Generator, truth: Truth, image: int) -> np.ndarray:
    """Up to 250 detections of an image: its boxes or others, exact or moved, with few, many or all scores equal."""
    count = int(random.choice([0, 1, 5, 30, 130, 250]))
    own = np.flatnonzero(truth.images == image)
    source = own if len(own) and random.random() < 0.9 else np.arange(len(truth.images))
    chosen = random.choice(source, count)
    moved = random.normal(0, 3, (count, 4)).round(int(random.choice([0, 9])))
    boxes = truth.boxes[chosen] + random.choice([0, 1, 1]) * moved
    boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2])  # some of no area
    scores = [random.integers(0, 6, count) / 6, random.random(count), np.full(count, 0.5), np.full(count, -0.0)]
    scores[3][::2] = 0.0  # equal to -0.0
    others = random.integers(2, CLASSES + 1, count) if random.random() < 0.8 else np.full(count, 3)
    labels = np.where(random.random(count) < 0.5, np.maximum(truth.labels[chosen], 2), others)
    return np.column_stack([np.full(count, float(image)), boxes, scores[random.integers(4)], labels])


def assert_equal(truth: Truth, detections: np.ndarray) -> Curves:
    ours, reference = (curves(library, truth, detections) for library in LIBRARIES)
    for name, mine, theirs in zip(Curves._fields, ours, reference, strict=True):
        np.testing.assert_array_equal(mine, theirs, err_msg=name, strict=True)
    assert coco.summarize(ours) == coco.summarize(reference)
    return ours


@pytest.mark.parametrize("seed", SEEDS)
def test_curves_are_equal_bit_for_bit(seed: int, capfd: pytest.CaptureFixture[str]) -> None:
    assert_equal(*adversarial(seed))
    assert capfd.readouterr() == ("", "")


def test_the_sets_hold_what_could_tell_the_libraries_apart() -> None:
    seen: dict[str, int] = {}

    def note(name: str, is_there: object) -> None:
        seen[name] = seen.get(name, 0) + bool(is_there)

    for seed in SEEDS:
        truth, rows = adversarial(seed)
        area = (rows[:, 3] - rows[:, 1]) * (rows[:, 4] - rows[:, 2])
        _, of_a_class = np.unique(rows[:, [0, 6]], axis=0, return_counts=True)
        _, equal = np.unique(rows[:, [0, 5, 6]], axis=0, return_counts=True)
        found = curves("hotcoco", truth, rows)
        note("some found, some missed", found.precision.max() > 0 and (found.recall[found.recall >= 0] < 1).any())
        note("crowds", truth.crowd.any())
        note("empty images with detections", set(rows[:, 0]) - set(truth.images))
        note("images without detections", set(truth.images) - set(rows[:, 0]))
        note("a class only in the ground truth", set(truth.labels) - set(rows[:, 6]))
        note("a class only in the detections", set(rows[:, 6]) - set(truth.labels))
        for side in (32, 96):
            note(f"detections of {side}^2", (area == side**2).any())
            note(
                f"boxes of {side}^2",
                (np.diff(truth.boxes[:, [0, 2]]) * np.diff(truth.boxes[:, [1, 3]]) == side**2).any(),
            )
        note("detections of no area", (area == 0).any())
        note("over 100 detections of a class in an image", of_a_class.max() > 100)
        note("equal scores", equal.max() > 1)
        note("large ids", truth.ids.max() > 2**31)
        note("images out of order", (np.diff(truth.ids) < 0).any())
        note("detections out of order", (np.diff(rows[:, 0]) < 0).any())
    assert min(seen.values()) >= 3, seen


@pytest.mark.parametrize("empty", ["ground truth", "detections", "both"])
def test_curves_are_equal_where_there_is_nothing(empty: str) -> None:
    truth, rows = adversarial(0)
    if empty != "detections":
        truth = Truth(truth.ids, CLASSES, *(column[:0] for column in truth[2:]))
    found = assert_equal(truth, rows[:0] if empty != "ground truth" else rows)
    assert found.recall.max() == (0 if empty == "detections" else -1)


@pytest.mark.parametrize("library", LIBRARIES)
def test_of_equal_scores_the_row_further_up_ranks_first(library: coco_backends.Library) -> None:
    box, beside = [0.0, 0, 50, 50], [200.0, 0, 250, 50]
    truth = one_image([box], crowd=[False])
    right, wrong = ([7.0, *corners, 0.5, 1] for corners in (box, beside))
    best = [curves(library, truth, np.array(rows)).recall[0, 0, 0, 0] for rows in ([right, wrong], [wrong, right])]
    assert best == [1, 0]  # of the first detection alone


@pytest.mark.parametrize("library", LIBRARIES)
def test_what_is_found_in_a_crowd_does_not_count(library: coco_backends.Library) -> None:
    truth = one_image([[0, 0, 50, 50], [100, 0, 400, 300]], crowd=[False, True])
    rows = np.array([[7, 150, 50, 200, 100, 0.9, 1], [7, 300, 50, 350, 100, 0.8, 1], [7, 0, 0, 50, 50, 0.7, 1]], float)
    found = curves(library, truth, rows)
    assert found.precision[:, :, 0, 0, -1].min() == pytest.approx(1)
    assert found.recall[:, 0, 0, -1].min() == 1
    assert found.scores[0, -1, 0, 0, -1] == 0.7
    no_crowd = curves(library, truth._replace(crowd=np.zeros(2, dtype=bool)), rows)
    assert no_crowd.precision[0, 0, 0, 0, -1] == pytest.approx(1 / 3)


def one_image(boxes: list[list[float]], crowd: list[bool]) -> Truth:
    images, labels = np.full(len(boxes), 7), np.ones(len(boxes), dtype=np.int64)
    return Truth(np.array([7]), 1, images, labels, np.array(boxes, dtype=np.float64), np.array(crowd))


def test_each_name_means_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    index, rows = random_case(0)
    expected = coco.evaluate(index, rows)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pycocotools.cocoeval", None)
        assert coco.evaluate(index, rows, "hotcoco") == coco.evaluate(index, rows, "auto") == expected
        with pytest.raises(ImportError):
            coco.evaluate(index, rows, "pycocotools")
    monkeypatch.setitem(sys.modules, "hotcoco", None)
    assert coco.evaluate(index, rows, "pycocotools") == expected


def test_without_hotcoco_pycocotools_evaluates_and_the_log_says_so_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    index, rows = random_case(1)
    expected = coco.evaluate(index, rows, "hotcoco")
    said: list[str] = []
    assert coco.library("auto") == "hotcoco"
    coco_backends.library.cache_clear()
    monkeypatch.setitem(sys.modules, "hotcoco", None)
    monkeypatch.setattr(log, "warning", said.append)
    assert coco.library("auto") == "pycocotools"
    assert coco.evaluate(index, rows) == coco.evaluate(index, rows) == expected
    (message,) = said
    assert "hotcoco" in message and "pycocotools evaluates" in message
    with pytest.raises(InputError, match=r"evaluator=hotcoco: .*install hotcoco, or set evaluator=pycocotools"):
        coco.evaluate(index, rows, "hotcoco")


def test_hotcoco_gets_arrays_and_no_object_for_each_box() -> None:
    truth, rows = adversarial(0)
    rows = rows.repeat(40_000 // len(rows), axis=0)
    columns = [column.repeat(40_000 // len(truth.labels), axis=0) for column in truth[2:]]
    truth = Truth(truth.ids, CLASSES, *columns)
    curves("hotcoco", truth, rows)  # imports
    tracemalloc.start()
    found = curves("hotcoco", truth, rows)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    arrays = rows.nbytes + sum(column.nbytes for column in columns)
    assert most < arrays + sum(curve.nbytes for curve in found)  # a list of a row's numbers takes four times the row
