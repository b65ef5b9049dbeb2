"""What an evaluation found, with the ground truth, in one file: enough to analyse and compare it, without the data."""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils import files
from utils.errors import InputError
from utils.labels import LabelIndex

FORMAT = 1


@dataclass(frozen=True, eq=False)  # one and the same object is the same: analyses of it are kept
class Evaluated:
    """N images with M boxes of C classes, and n detections. Image i has the boxes offsets[i] to offsets[i + 1]."""

    ids: np.ndarray  # (N,) int64
    names: np.ndarray  # (N,) str: paths below the data set's root
    sizes: np.ndarray  # (N, 2) int64: width, height
    offsets: np.ndarray  # (N + 1,) int64
    boxes: np.ndarray  # (M, 4) float64: x1, y1, x2, y2 in pixels
    labels: np.ndarray  # (M,) int64: 1..C
    classes: tuple[str, ...]
    detections: np.ndarray  # (n, 7) float64: rows of utils.coco.COLUMNS
    split: str
    fingerprint: str  # of the data


def save(path: Path, index: LabelIndex, detections: np.ndarray) -> None:
    """Write a split and its detections, rows of `utils.coco.COLUMNS`, atomically."""
    words = {
        "format": FORMAT,
        "split": index.split,
        "fingerprint": index.tree.fingerprint,
        "classes": index.classes,
        "names": [index.tree.name(number) for number in index.numbers.tolist()],
    }
    content = io.BytesIO()
    np.savez_compressed(
        content,
        words=np.frombuffer(json.dumps(words).encode(), dtype=np.uint8),
        ids=index.ids,
        sizes=index.sizes,
        offsets=index.offsets,
        boxes=_narrow(index.boxes),
        labels=index.labels,
        detected_ids=detections[:, 0].astype(np.int64),
        detected=_narrow(detections[:, 1:6]),
        detected_labels=detections[:, 6].astype(np.int32),
    )
    files.write_atomic(path, lambda file: file.write(content.getbuffer()))


def load(path: Path) -> Evaluated:
    """What `save` wrote, number for number. Raises: InputError when the file is missing, damaged or another one."""
    try:
        with zipfile.ZipFile(path) as archive:
            found = {name.removesuffix(".npy"): _array(archive, name) for name in archive.namelist()}
        words = json.loads(found["words"].tobytes())
        detected = (found["detected_ids"], found["detected"], found["detected_labels"])
        if words["format"] == FORMAT:
            return Evaluated(
                ids=found["ids"],
                names=np.array(words["names"], dtype=np.str_),
                sizes=found["sizes"],
                offsets=found["offsets"],
                boxes=found["boxes"].astype(np.float64),
                labels=found["labels"],
                classes=tuple(words["classes"]),
                detections=np.column_stack(detected).astype(np.float64, copy=False),
                split=words["split"],
                fingerprint=words["fingerprint"],
            )
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}; evaluate.run writes it beside its report") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, KeyError, TypeError, NotImplementedError) as error:
        reason = "damaged, or not what evaluate.run writes; evaluate again"
        raise InputError(f"{path}: {reason} ({type(error).__name__}: {error})") from None
    raise InputError(f"{path}: of format {words['format']}, this version reads {FORMAT}; evaluate again")


def _array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    with archive.open(name) as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def _narrow(values: np.ndarray) -> np.ndarray:
    """As float32 if that is exact."""
    narrow = values.astype(np.float32)
    return narrow if np.array_equal(narrow, values) else values
