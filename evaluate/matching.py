"""Detections matched with boxes as COCO does it, all images and classes at once, in arrays that can be counted anew."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np

from evaluate.detections_file import Evaluated

IOUS = np.linspace(0.5, 0.95, 10)
AREAS = ((0, 1e10), (0, 32**2), (32**2, 96**2), (96**2, 1e10))  # all, small, medium, large
MOST = 100  # detections of an image and class that count


class Found(NamedTuple):
    """Detections of an area range in the order of class and score, and its boxes."""

    images: np.ndarray  # (n,) index of each detection's image
    starts: np.ndarray  # (C,) of each class
    counted: np.ndarray  # (10, n) bool, or (1, n) for all IoUs: right or wrong, and not of another size
    right: list[np.ndarray]  # of each IoU, ascending: the detections that match a box
    labels: np.ndarray  # (n,) class from 0
    ranks: np.ndarray  # (n,) among those of its image and class
    boxes: np.ndarray  # (N, C) float64: boxes of each image and class


def match(evaluated: Evaluated) -> list[Found]:
    """Detections matched with boxes as COCO does it, for each of AREAS."""
    classes = len(evaluated.classes)
    by_id = np.argsort(evaluated.ids, kind="stable")
    position = np.empty_like(by_id)
    position[by_id] = np.arange(len(by_id))
    box_image = np.repeat(position, np.diff(evaluated.offsets))
    box_group = box_image * classes + evaluated.labels - 1
    rows = evaluated.detections
    image = np.searchsorted(evaluated.ids[by_id], rows[:, 0].astype(np.int64))
    group = image * classes + rows[:, 6].astype(np.int64) - 1
    order = np.lexsort((-rows[:, 5], group))  # ties stay in order
    first = np.flatnonzero(np.diff(group[order], prepend=-1))
    ranks = np.arange(len(order)) - np.repeat(first, np.diff(np.append(first, len(order))))
    order, ranks = order[ranks < MOST], ranks[ranks < MOST]
    rows, image, group = rows[order], image[order], group[order]
    pairs = overlapping(rows[:, 1:5], group, evaluated.boxes, box_group, IOUS[0])
    by_class = np.lexsort((-rows[:, 5], group % classes))  # then by image, as COCO puts them together
    box_areas, areas = _areas(evaluated.boxes), _areas(rows[:, 1:5])
    result = []
    for low, high in AREAS:
        ignored = (box_areas < low) | (box_areas > high)
        is_right, is_ignored = _assign(pairs, ranks, ignored)
        outside = (areas < low) | (areas > high)
        counted = is_right | ~(is_ignored | outside)
        kept = by_class[counted[:, by_class].any(axis=0)]
        labels = group[kept] % classes
        shown = counted[:, kept]
        boxes = np.zeros((len(by_id), classes))
        np.add.at(boxes, (box_image[~ignored], evaluated.labels[~ignored] - 1), 1)
        result.append(
            Found(
                images=by_id[image[kept]],
                starts=np.searchsorted(labels, np.arange(classes)),
                counted=shown[:1] if shown.all() else shown,
                right=[np.flatnonzero(row) for row in is_right[:, kept]],
                labels=labels,
                ranks=ranks[kept],
                boxes=boxes[position],
            )
        )
    return result


class Pairs(NamedTuple):
    """Detections and boxes that overlap, by their rows."""

    detections: np.ndarray
    boxes: np.ndarray
    ious: np.ndarray


def _areas(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def overlapping(found: np.ndarray, group: np.ndarray, boxes: np.ndarray, box_group: np.ndarray, least: float) -> Pairs:
    """`found` (n, 4) and `boxes` (m, 4) of the same group, such as an image, with an IoU of `least` or more."""
    by_group = np.argsort(box_group, kind="stable")
    start, end = (np.searchsorted(box_group[by_group], group, side) for side in ("left", "right"))
    counts = end - start
    detection = np.repeat(np.arange(len(group)), counts)
    within = np.arange(len(detection)) - np.repeat(np.cumsum(counts) - counts, counts)
    box = by_group[np.repeat(start, counts) + within]
    mine, real = found[detection], boxes[box]
    ends = [each[:, :2] + (each[:, 2:] - each[:, :2]) for each in (mine, real)]  # corner and size, as COCO has them
    sides = np.minimum(*ends) - np.maximum(mine[:, :2], real[:, :2])
    shared = np.where((sides > 0).all(axis=1), sides[:, 0] * sides[:, 1], 0.0)
    union = _areas(mine) + _areas(real) - shared
    iou = np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)
    near = iou >= least
    return Pairs(detection[near], box[near], iou[near])


def _assign(pairs: Pairs, ranks: np.ndarray, ignored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each IoU, (10, n) bool: detections that match a box, and those that match an `ignored` one.

    In the order of their scores each takes the box it overlaps most of those left, an ignored one only for want of
    others; all images and classes at once.
    """
    right, beside = (np.zeros((len(IOUS), len(ranks)), dtype=bool) for _ in range(2))
    taken = np.zeros((len(IOUS), len(ignored)), dtype=bool)
    rank = ranks[pairs.detections]
    order = np.lexsort((-pairs.boxes, -pairs.ious, ignored[pairs.boxes], pairs.detections, rank))
    detections, boxes, ious = (column[order] for column in pairs)
    bounds = np.searchsorted(rank[order], np.arange(MOST + 1))
    for begin, end in itertools.pairwise(bounds):
        if begin == end:
            continue
        mine, box = detections[begin:end], boxes[begin:end]
        free = (ious[begin:end] >= IOUS[:, None]) & ~taken[:, box]
        first = np.flatnonzero(np.diff(mine, prepend=-1))
        best = np.minimum.reduceat(np.where(free, np.arange(end - begin), end - begin), first, axis=1)
        iou, which = np.nonzero(best < end - begin)
        chosen = box[best[iou, which]]
        taken[iou, chosen] = True
        right[iou, mine[first[which]]] = ~ignored[chosen]
        beside[iou, mine[first[which]]] = ignored[chosen]
    return right, beside
