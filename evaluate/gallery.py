"""Pictures of the report page: the best, the worst and the most confidently wrong, with their boxes."""

from __future__ import annotations

import base64
import io
import posixpath
from collections.abc import Iterator
from typing import Any

from PIL import Image

from evaluate import analysis
from evaluate.analysis import Picture
from evaluate.chain_files import ChainFiles, StageFiles
from evaluate.detections_file import Evaluated
from utils import images, paths, squashfs
from utils.errors import InputError, RelayError
from utils.tree import Tree

EACH = 4  # pictures of a kind
SIDE, QUALITY = 480, 80  # of a picture in the page: longer side in pixels, JPEG's quality
NAMED = 14  # boxes in a picture up to which all have their names; beyond, what is wrong has
LETTERS = 24  # of a class's name in a picture
LINE = 15  # pixels of a line of text
GROUPS = {
    "best": ("Best", "The highest F1: objects found, and little else."),
    "worst": ("Worst", "The lowest F1: objects missed, and detections of what is not there."),
    "confident": ("Most confident mistakes", "The wrong detections with the highest scores."),
}
KINDS = (
    ("truth", "an object, found"),
    ("correct", "a detection, correct"),
    ("wrong", "a detection, wrong"),
    ("missed", "an object, missed"),
)


def pictures(chain: ChainFiles, found: Evaluated | None, why: str) -> dict[str, Any]:
    """What the template shows, or why there are no pictures."""
    stage = chain.evaluation
    if found is None or stage is None:
        return {"missing": why}
    try:
        tree = _tree(stage, found)
        ranked = analysis.ranked(found, EACH)
        chosen = {"best": ranked.best, "worst": ranked.worst, "confident": ranked.confident}
        groups = [
            {"title": title, "about": about, "pictures": [_picture(found, tree, one) for one in chosen[name]]}
            for name, (title, about) in GROUPS.items()
            if chosen[name]
        ]
    except (RelayError, OSError) as error:
        return {"missing": f"The images cannot be read: {error}."}
    about = f"Detections from a score of {ranked.score:.2f} on, at IoU .50; there F1 over the whole split is highest."
    return {"missing": "", "groups": groups, "kinds": KINDS, "about": about}


def _tree(stage: StageFiles, found: Evaluated) -> Tree:
    """The evaluated set. Raises: InputError when it is gone, or another one by now."""
    source = stage.config.get("data.labeled")
    if not isinstance(source, str):
        raise InputError(f"{stage.name} names no data")
    tree = squashfs.stage(source, paths.staging_root(stage.run_dir))
    if tree.fingerprint != found.fingerprint:
        raise InputError(f"{source} is not the data that was evaluated: its content is another")
    return tree


def _picture(found: Evaluated, tree: Tree, chosen: Picture) -> dict[str, Any]:
    """A picture and its boxes, in a drawing whose longer side is SIDE."""
    name = str(found.names[chosen.image])
    original = found.sizes[chosen.image]
    larger = SIDE / max(original)  # small ones too: texts and lines are in units of the page
    width, height = (max(1, round(side * larger)) for side in original.tolist())
    scale = (width / original[0], height / original[1])
    drawn = list(_drawn(found, chosen))
    texts = len(drawn) <= NAMED
    boxes = [_box(*one, scale, (width, height), texts) for one in drawn]
    url = _thumbnail(_read(tree, name), name)
    return {"url": url, "width": width, "height": height, "boxes": boxes, "title": _title(name, chosen)}


def _title(name: str, chosen: Picture) -> str:
    wrong, right = int((~chosen.correct).sum()), int(chosen.correct.sum())
    return f"{name}: {right} right, {wrong} wrong, {len(chosen.missed)} missed"


def _drawn(found: Evaluated, chosen: Picture) -> Iterator[tuple[str, Any, str]]:
    """(kind, box, text) from the least to the most important: later ones lie above."""
    start = int(found.offsets[chosen.image])
    missed = set(map(int, chosen.missed))
    for row in range(start, int(found.offsets[chosen.image + 1])):
        if row not in missed:
            yield "truth", found.boxes[row], ""
    for kind, which in (("correct", chosen.correct), ("wrong", ~chosen.correct)):
        for detection in found.detections[chosen.rows[which]]:
            yield kind, detection[1:5], f"{_short(found, detection[6])} {detection[5]:.2f}"
    for row in sorted(missed):
        yield "missed", found.boxes[row], _short(found, found.labels[row])


def _short(found: Evaluated, label: Any) -> str:
    name = found.classes[int(label) - 1]
    return name if len(name) <= LETTERS else f"{name[: LETTERS - 1]}…"


def _box(
    kind: str, box: Any, text: str, scale: tuple[float, float], size: tuple[int, int], all_named: bool
) -> dict[str, Any]:
    x1, x2 = (min(max(float(x) * scale[0], 1.0), size[0] - 1.0) for x in (box[0], box[2]))
    y1, y2 = (min(max(float(y) * scale[1], 1.0), size[1] - 1.0) for y in (box[1], box[3]))
    above = y1 - 4 if y1 > LINE else y1 + LINE
    below = y2 + LINE if y2 < size[1] - LINE else y2 - 5  # where a wrong detection of the same object has no text
    at_end = x1 > 0.65 * size[0]
    return {
        "kind": kind,
        "x": f"{x1:.1f}",
        "y": f"{y1:.1f}",
        "width": f"{max(x2 - x1, 1.0):.1f}",
        "height": f"{max(y2 - y1, 1.0):.1f}",
        "text": text if all_named or kind == "wrong" else "",
        "text_x": f"{x2 - 2 if at_end else x1 + 2:.1f}",
        "text_y": f"{above if kind != 'missed' else below:.1f}",
        "at_end": at_end,
    }


def _read(tree: Tree, name: str) -> bytes:
    for number in tree.find(posixpath.dirname(name), images.SUFFIXES, deep=False).tolist():
        if tree.name(number) == name:
            return tree.read(number)
    raise InputError(f"{tree}: {name} is not there")


def _thumbnail(content: bytes, name: str) -> str:
    """A data URL of the picture, made small."""
    image = images.decode(content, name)
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=QUALITY, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
