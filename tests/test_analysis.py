"""What is behind an evaluation's numbers, against cases counted by hand and against COCO's own numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evaluate import analysis, bootstrap, detections_file, matching, tide
from evaluate.detections_file import Evaluated
from tests.test_coco import make_index, random_case
from utils import coco, coco_backends
from utils.coco_names import METRICS
from utils.errors import InputError

BOX = [10.0, 10.0, 50.0, 50.0]
FAR = [200.0, 200.0, 240.0, 240.0]
Row = tuple[int, list[float], float, int]  # image, box, score, label


def made(truth: list[list[tuple[list[float], int]]], rows: list[Row], classes: int = 3) -> Evaluated:
    """Images 1.. with boxes and labels, and what is found in them."""
    counts = [len(boxes) for boxes in truth]
    flat = [one for boxes in truth for one in boxes]
    table = [[float(image), *box, score, float(label)] for image, box, score, label in rows]
    return Evaluated(
        ids=np.arange(1, len(truth) + 1),
        names=np.array([f"validation/images/{image}.JPEG" for image in range(1, len(truth) + 1)]),
        sizes=np.full((len(truth), 2), 300),
        offsets=np.cumsum([0, *counts]),
        boxes=np.array([box for box, _ in flat]).reshape(-1, 4),
        labels=np.array([label for _, label in flat], dtype=np.int64),
        classes=tuple(f"class {label}" for label in range(1, classes + 1)),
        detections=np.array(table).reshape(-1, 7),
        split="validation",
        fingerprint="",
    )


def random_one(seed: int, tmp_path: Path) -> tuple[Evaluated, coco.Result]:
    index, rows = random_case(seed)
    detections_file.save(tmp_path / "detections.npz", index, rows)
    return detections_file.load(tmp_path / "detections.npz"), coco.evaluate(index, rows)


# images, one for each kind of error of TIDE: all find the box of class 1 in another wrong way
WRONG: dict[str, list[Row]] = {
    "Cls": [(1, BOX, 0.9, 2)],
    "Loc": [(2, [10.0, 10.0, 50.0, 26.0], 0.8, 1)],  # IoU .4
    "Both": [(3, [10.0, 10.0, 50.0, 26.0], 0.7, 2)],
    "Dupe": [(4, BOX, 0.95, 1), (4, BOX, 0.6, 1)],
    "Bkg": [(5, FAR, 0.5, 1), (5, BOX, 0.4, 1)],
    "Miss": [],
}


def all_kinds() -> Evaluated:
    return made([[(BOX, 1)]] * 6, [row for rows in WRONG.values() for row in rows])


@pytest.mark.parametrize("kind", WRONG)
def test_each_kind_of_error_is_counted_alone(kind: str) -> None:
    image = list(WRONG).index(kind) + 1
    rows = [(1, *row[1:]) for row in WRONG[kind]]
    found = tide.errors(made([[(BOX, 1)]], rows))
    expected = dict.fromkeys(WRONG, 0) | {kind: 1} | ({"Miss": 1} if kind == "Both" else {})
    assert {name: count for name, (_, count) in found.items() if count is not None} == expected, image


def test_errors_of_a_whole_set_add_up_and_cost_what_their_correction_gains() -> None:
    found = tide.errors(all_kinds())
    counts = {name: count for name, (_, count) in found.items()}
    assert counts == {"Cls": 1, "Loc": 1, "Both": 1, "Dupe": 1, "Bkg": 1, "Miss": 2, "FP": None, "FN": None}
    # corrected, class 1 has one more right in the place of what was wrong
    for kind, row in (("Cls", (1, BOX, 0.9, 1)), ("Loc", (2, BOX, 0.8, 1))):
        rows = [row if old == WRONG[kind][0] else old for rows in WRONG.values() for old in rows]
        gain = analysis.stats(made([[(BOX, 1)]] * 6, rows))["AP50"] - analysis.stats(all_kinds())["AP50"]
        assert found[kind][0] == pytest.approx(gain, abs=1e-12) and gain > 0.05


ALL_FOUND: list[Row] = [(image, BOX, 0.9, 1) for image in range(1, 6)]
LOW = [10.0, 10.0, 50.0, 26.0]  # IoU .4 with BOX


@pytest.mark.parametrize(
    ("truth", "rows", "miss", "every"),
    [
        ([[(BOX, 1), (FAR, 2)]] * 5, ALL_FOUND, 0.5, 0.5),
        ([[(BOX, 1)]] * 5 + [[(BOX, 2)]] * 5, [*ALL_FOUND, (6, BOX, 0.95, 1)], 0.0, 0.417),  # a classification error
        ([[(BOX, 1)]] * 5 + [[(BOX, 2), (LOW, 1)]] * 5, [*ALL_FOUND, (6, BOX, 0.95, 1)], 0.483, 0.623),  # localisation
    ],
)
def test_what_missed_objects_of_a_class_that_is_never_detected_cost(
    truth: list[Any], rows: list[Row], miss: float, every: float
) -> None:
    """The numbers are those of the paper's authors' tidecv 1.0.1."""
    found = tide.errors(made(truth, rows))
    assert (found["Miss"][0], found["FN"][0]) == pytest.approx((miss, every), abs=0.0005)


def test_confusion_counts_boxes_by_row_and_what_is_found_by_column() -> None:
    truth = [[(BOX, 1)], [(BOX, 1)], [(BOX, 2)], [(BOX, 3)], []]
    rows = [(1, BOX, 0.9, 1), (2, BOX, 0.8, 2), (3, BOX, 0.7, 2), (5, FAR, 0.95, 3), (3, FAR, 0.1, 1)]
    found = made(truth, rows)
    assert analysis.best_score(found) == 0.7
    expected = [[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]]
    assert analysis.confusion(found).tolist() == expected  # nothing below the score


def test_equal_scores_count_together_for_the_best_one() -> None:
    rows = [(1, BOX, 0.9, 1), (2, BOX, 0.5, 1), *[(3, FAR, 0.5, 1)] * 4]
    assert analysis.best_score(made([[(BOX, 1)], [(BOX, 1)], []], rows)) == 0.9
    assert analysis.best_score(made([[(BOX, 1)]], [(1, FAR, 0.9, 1)])) == 1.0


def test_images_are_ranked_by_what_is_right_in_them() -> None:
    two = [(BOX, 1), (FAR, 2)]
    rows = [
        (1, BOX, 0.75, 1),
        (2, BOX, 0.85, 1),
        (3, BOX, 0.99, 2), (3, FAR, 0.7, 1), (3, FAR, 0.05, 2),
        (4, FAR, 0.06, 1), (4, BOX, 0.06, 1),
        (5, BOX, 0.9, 1), (5, FAR, 0.8, 2),
        (6, BOX, 0.75, 1),
    ]  # fmt: skip
    found = made([[(BOX, 1)], two, two, [], two, []], rows)
    ranked = analysis.ranked(found, 2)
    assert ranked.score == 0.75
    assert [one.image for one in ranked.best] == [4, 0]  # of two perfect ones the one with more in it
    assert [one.image for one in ranked.worst] == [2, 5]  # in image 4 nothing counts
    assert [one.image for one in ranked.confident] == [2, 5]
    third = ranked.worst[0]
    assert (third.rows.tolist(), third.correct.tolist(), third.missed.tolist()) == ([2], [False], [3, 4])
    best = ranked.best[0]
    assert (best.rows.tolist(), best.correct.tolist(), best.missed.tolist()) == ([7, 8], [True, True], [])


@pytest.mark.parametrize("seed", range(4))
def test_numbers_are_those_of_the_evaluation(seed: int, tmp_path: Path) -> None:
    found, expected = random_one(seed, tmp_path)
    assert analysis.stats(found) == expected.stats
    assert analysis.per_class(found) == expected.per_class
    ours = bootstrap.numbers(found, np.ones((2, len(found.ids)), dtype=np.int64))
    assert np.where(np.isnan(ours), -1, ours) == pytest.approx(
        np.tile(list(expected.stats.values()), (2, 1)), abs=1e-12
    )


def test_a_box_of_the_size_in_question_comes_before_a_nearer_one() -> None:
    small, larger = [10.0, 10.0, 41.0, 41.0], [10.0, 10.0, 43.0, 43.0]  # 31 and 33 pixels: IoU .88
    found = made([[(small, 1), (larger, 1)]], [(1, larger, 0.9, 1)])
    ours = bootstrap.numbers(found, np.ones((1, 1), dtype=np.int64))[0]
    expected = analysis.stats(found)
    assert expected["APs"] == pytest.approx(0.8)  # up to IoU .85
    assert np.where(np.isnan(ours), -1, ours) == pytest.approx(list(expected.values()), abs=1e-12)


def test_a_hundred_detections_of_an_image_and_class_count() -> None:
    rows = [(1, FAR, 1 - number / 1000, 1) for number in range(150)]
    found = made([[], [(BOX, 1)]], [*rows, (2, BOX, 0.5, 1)])
    assert analysis.stats(found)["AP"] == pytest.approx(1 / 101)
    ours = bootstrap.numbers(found, np.ones((1, 2), dtype=np.int64))[0]
    assert ours[:2] == pytest.approx([1 / 101, 1 / 101])


def test_an_image_drawn_twice_counts_as_two_images() -> None:
    """Against pycocotools on a set in which the images do stand several times."""
    random = np.random.default_rng(3)
    images, sizes = 12, random.choice([20.0, 60.0, 120.0], 40)
    image = np.sort(random.integers(0, images, 40))
    corner = random.uniform(0, 200, (40, 2))
    boxes = np.hstack([corner, corner + sizes[:, None]])
    labels = random.integers(1, 4, 40)
    found = np.repeat(np.arange(40), 2)
    rows = np.column_stack(
        [image[found] + 1, boxes[found] + random.normal(0, 5, (80, 4)), random.random(80), random.integers(1, 4, 80)]
    )
    rows[::2, 6] = labels
    counts = np.bincount(image, minlength=images)
    truth = [[(boxes[n].tolist(), int(labels[n])) for n in np.flatnonzero(image == i)] for i in range(images)]
    evaluated = made(truth, [(int(r[0]), r[1:5].tolist(), r[5], int(r[6])) for r in rows])
    weights = bootstrap.draws(images, 3, seed=1)
    assert weights.max() > 1 and (weights == 0).any() and (weights.sum(axis=1) == images).all()
    ours = bootstrap.numbers(evaluated, weights)
    for weight, numbers in zip(weights, ours, strict=True):
        drawn = np.repeat(np.arange(images), weight)
        of_boxes = np.concatenate([np.flatnonzero(image == i) for i in drawn])
        parts = [evaluated.detections[evaluated.detections[:, 0] == i + 1].copy() for i in drawn]
        for number, part in enumerate(parts):
            part[:, 0] = number + 1
        copies = coco_backends.Truth(
            np.arange(1, images + 1), 3, np.repeat(np.arange(1, images + 1), counts[drawn]), labels[of_boxes],
            boxes[of_boxes], np.zeros(len(of_boxes), dtype=bool),
        )  # fmt: skip
        expected, _ = coco.summarize(coco_backends.by_pycocotools(copies, np.vstack(parts)))
        assert np.where(np.isnan(numbers), -1, numbers) == pytest.approx(list(expected.values()), abs=1e-12)


def half_found(images: int, right: int) -> Evaluated:
    """One object an image; in the first `right` of them it is found."""
    return made([[(BOX, 1)]] * images, [(image, BOX, 0.5, 1) for image in range(1, right + 1)], classes=1)


def test_the_interval_of_a_share_is_the_binomial_one() -> None:
    """AR is then the share of the images, whose bootstrap is known: 40 of 100, standard deviation .049."""
    known = analysis.intervals(half_found(100, 40))
    ar = known["AR100"]
    assert ar is not None and ar.value == pytest.approx(0.4)
    assert (ar.lower, ar.upper) == pytest.approx((0.4 - 1.96 * 0.049, 0.4 + 1.96 * 0.049), abs=0.015)
    assert known["ARl"] is None  # no such object
    assert set(known) == set(METRICS)


def test_a_paired_difference_is_surer_than_the_numbers() -> None:
    base, other = half_found(100, 40), half_found(100, 46)
    difference = analysis.differences(base, other)["AR100"]
    own = analysis.intervals(base)["AR100"]
    assert difference is not None and own is not None
    assert difference.value == pytest.approx(0.06) and difference.is_beyond_noise
    assert difference.upper - difference.lower < 0.6 * (own.upper - own.lower)
    same = analysis.differences(base, half_found(100, 40))["AR100"]
    assert same is not None and same == (0, 0, 0) and not same.is_beyond_noise


def test_runs_of_many_and_of_few_detections_are_drawn_the_same_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "WORK", 10_000)
    bootstrap.resampled.cache_clear()
    base, other = half_found(100, 20), half_found(100, 40)
    assert [len(bootstrap.resampled(one)) for one in (base, other)] == [500, 250]
    assert (bootstrap.draws(100, 500, 0)[:250] == bootstrap.draws(100, 250, 0)).all()
    difference = analysis.differences(base, other)["AR100"]
    assert difference is not None and difference.lower > 0.1


def test_too_few_images_have_no_interval() -> None:
    assert analysis.intervals(half_found(matching.MOST, 5))["AP"] is not None
    few = made([[(BOX, 1)]] * (bootstrap.FEWEST - 1) + [[]] * 50, [(1, BOX, 0.5, 1)])
    assert set(analysis.intervals(few).values()) == {None}
    enough = made([[(BOX, 1)]] * bootstrap.FEWEST + [[]] * 50, [(1, BOX, 0.5, 1)])
    assert [name for name, known in analysis.intervals(enough).items() if known] == [
        "AP", "AP50", "AP75", "APm", "AR1", "AR10", "AR100", "ARm",
    ]  # fmt: skip


def test_curves_are_the_precision_at_each_recall() -> None:
    rows = [(1, BOX, 0.9, 1), (2, FAR, 0.8, 1), (2, BOX, 0.7, 1)]
    found = analysis.curves(made([[(BOX, 1)], [(BOX, 1)]], rows))
    assert found.recall[[0, 50, 100]].tolist() == [0, 0.5, 1]
    assert found.precision.shape == (3, 101)
    assert found.precision[0, [0, 50, 51, 100]] == pytest.approx([1, 1, 2 / 3, 2 / 3])
    assert np.isnan(found.precision[1:]).all()
    assert {name: mean[-1] for name, mean in found.means.items()} == pytest.approx(dict.fromkeys(found.means, 2 / 3))
    assert list(found.means) == [".50", ".75", ".50:.95"]


def test_detections_are_read_back_number_for_number(tmp_path: Path) -> None:
    index, rows = random_case(1)
    exact = rows.copy()
    exact[:, 1:6] = exact[:, 1:6].astype(np.float32)
    for given in (rows, exact, rows[:0]):
        detections_file.save(tmp_path / "detections.npz", index, given)
        found = detections_file.load(tmp_path / "detections.npz")
        for name in ("ids", "sizes", "offsets", "boxes", "labels"):
            assert (getattr(found, name) == getattr(index, name)).all()
            assert getattr(found, name).dtype == getattr(index, name).dtype
        assert (
            found.detections.dtype == np.float64 and found.detections.tobytes() == np.ascontiguousarray(given).tobytes()
        )
        assert (found.classes, found.split, found.fingerprint) == (index.classes, "validation", index.tree.fingerprint)
        assert found.names.tolist() == [index.tree.name(number) for number in index.numbers]


def test_a_file_that_is_not_whole_or_another_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "detections.npz"
    index, rows = random_case(1)
    detections_file.save(file, index, rows)
    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for content in (b"", whole[:-9], whole[: len(whole) // 2], bytes(flipped), b"no zip"):
        file.write_bytes(content)
        with pytest.raises(InputError, match=r"detections\.npz: damaged, or not what evaluate\.run writes"):
            detections_file.load(file)
    np.savez(file, words=np.array([{}], dtype=object))
    with pytest.raises(InputError, match="damaged"):  # nothing is unpickled
        detections_file.load(file)
    with pytest.raises(InputError, match=r"none\.npz: No such file"):
        detections_file.load(tmp_path / "none.npz")


def test_a_later_format_is_refused_by_its_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detections_file, "FORMAT", 2)
    detections_file.save(tmp_path / "d.npz", make_index([1], np.array([BOX]), [1]), np.zeros((0, 7)))
    monkeypatch.undo()
    with pytest.raises(InputError, match="of format 2, this version reads 1"):
        detections_file.load(tmp_path / "d.npz")
