"""How often the 95 % intervals of an evaluation hold the truth, on detections whose truth is known.

    python -m bench.intervals [--sets 200] [--images 100] [--truth 20000]

Two detectors look at the same pictures of a made-up population: pictures are easy or hard, objects of 8 to 300 pixels
are found more or less exactly, called by another class, found twice or missed, and some are seen where there is none.
The second detector finds a few more. Their true numbers are those of `truth` other images. `sets` test sets of
`images` images are drawn: which share of the intervals holds the true number, and of those for the difference
between the detectors the true difference. Coverage of 200 sets is known to about 3 percentage points.
"""

from __future__ import annotations

import numpy as np

from bench.measure import Row, arguments, report
from evaluate import analysis, bootstrap
from evaluate.bootstrap import Interval
from evaluate.detections_file import Evaluated
from utils.coco_names import METRICS

CLASSES = 5
SHARES = np.array([0.4, 0.25, 0.2, 0.1, 0.05])  # of the objects
SIDE = 640  # pixels, of a picture
FOUND = 0.70, 0.75  # of the objects, by each detector
SHOWN = ("AP", "AP50", "AP75", "APl", "AR100")


def pair(images: int, seed: int) -> tuple[Evaluated, Evaluated]:
    """What both detectors find on the same new images."""
    random = np.random.default_rng(seed)
    counts = random.poisson(4, images)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    size = np.exp(random.uniform(np.log(8), np.log(300), (offsets[-1], 2)))
    corner = random.uniform(0, SIDE - size)
    boxes, labels = np.hstack([corner, corner + size]), random.choice(CLASSES, offsets[-1], p=SHARES) + 1
    ease = random.normal(0, 0.15, images)  # pictures differ: what is in one is found or missed together
    luck = random.random(len(boxes))  # and what one detector finds, the other mostly finds too

    def evaluated(found: float) -> Evaluated:
        rows = _detections(random, counts, boxes, labels, ease, luck < found + np.repeat(ease, counts))
        return Evaluated(
            ids=np.arange(1, images + 1),
            names=np.array([f"{number}.JPEG" for number in range(1, images + 1)]),
            sizes=np.full((images, 2), SIDE),
            offsets=offsets,
            boxes=boxes,
            labels=labels,
            classes=tuple(f"class {number}" for number in range(1, CLASSES + 1)),
            detections=rows,
            split="validation",
            fingerprint="",
        )

    first, second = map(evaluated, FOUND)
    return first, second


def _detections(
    random: np.random.Generator,
    counts: np.ndarray,
    boxes: np.ndarray,
    labels: np.ndarray,
    ease: np.ndarray,
    is_found: np.ndarray,
) -> np.ndarray:
    """Rows of utils.coco.COLUMNS: of what is found, a tenth twice and a tenth as another class, and of nothing."""
    images = np.repeat(np.arange(len(counts)), counts)
    seen = np.concatenate([np.flatnonzero(is_found), np.flatnonzero(is_found & (random.random(len(boxes)) < 0.1))])
    sides = boxes[seen, 2:] - boxes[seen, :2]
    near = boxes[seen] + random.normal(0, 0.06, (len(seen), 4)) * np.hstack([sides, sides])
    called = np.where(random.random(len(seen)) < 0.1, random.integers(1, CLASSES + 1, len(seen)), labels[seen])
    nothing = np.repeat(np.arange(len(counts)), random.poisson(3, len(counts)))
    size = np.exp(random.uniform(np.log(8), np.log(300), (len(nothing), 2)))
    corner = random.uniform(0, SIDE - size)
    of_image = np.concatenate([images[seen], nothing])
    where = np.vstack([near, np.hstack([corner, corner + size])])
    where[:, 2:] = np.maximum(where[:, 2:], where[:, :2])
    kind = np.concatenate([called, random.integers(1, CLASSES + 1, len(nothing))])
    strength = np.concatenate([random.normal(1.0, 1, len(seen)), random.normal(-0.8, 1, len(nothing))])
    scores = 1 / (1 + np.exp(-strength - ease[of_image]))
    return np.column_stack([of_image + 1, where, scores, kind]).astype(np.float64)


def truth(images: int) -> list[np.ndarray]:
    """The twelve numbers of the first detector, and what the second one has more, on as good as the population."""
    once = np.ones((1, images), dtype=np.int64)
    first, second = (bootstrap.numbers(one, once)[0] for one in pair(images, seed=1_000_000))
    return [first, second - first]


def plain(first: Evaluated, second: Evaluated) -> list[np.ndarray]:
    """The peer, (2, 12) each: percentiles as they come, for the numbers and for the difference."""
    one, two = (bootstrap.resampled(each) for each in (first, second))
    return [np.percentile(draws, bootstrap.PERCENT, axis=0) for draws in (one, two - one)]


def main() -> None:
    given = arguments(__doc__, sets=200, images=100, truth=20000)
    expected = truth(given.truth)
    held = np.zeros((2, 2, len(METRICS)))  # own numbers and differences; ours and the peer
    width, bias = np.zeros((2, len(METRICS))), np.zeros((2, len(METRICS)))
    for seed in range(given.sets):
        first, second = pair(given.images, seed)
        ours = [analysis.intervals(first), analysis.differences(first, second)]
        for kind, (intervals, (low, high), real) in enumerate(zip(ours, plain(first, second), expected, strict=True)):
            known = np.array([intervals[name] or Interval(-1, -1, -1) for name in METRICS])
            held[kind, 0] += (known[:, 1] <= real) & (real <= known[:, 2])
            held[kind, 1] += (low <= real) & (real <= high)
            width[kind] += (known[:, 2] - known[:, 1]) / given.sets
            bias[kind] += (known[:, 0] - real) / given.sets
    rows = []
    for kind, what in enumerate(("", "difference of ")):
        for name in SHOWN:
            place = METRICS.index(name)
            mine, peer = held[kind, :, place] / given.sets
            about = f"truth {expected[kind][place]:.3f}, here {bias[kind, place]:+.3f}, width {width[kind, place]:.3f}"
            rows.append(Row(f"{what}{name}: {about}", f"{mine:.1%}", f"{peer:.1%}", mine / peer, None))
    print(f"{given.sets} sets of {given.images} images; ours beside percentiles as they come; 95 % is wanted\n")
    report("intervals", rows)


if __name__ == "__main__":
    main()
