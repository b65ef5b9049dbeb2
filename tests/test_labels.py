"""The labelled set is read exactly, cached while nothing changes, and every problem in it is named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.archives import NEEDS_TOOLS
from tests.labeled_set import archived, write_example, write_label, write_set
from utils import array_file, images, labels, squashfs
from utils.archive import Archive
from utils.errors import InputError
from utils.labels import LabelIndex
from utils.shared_config import Stage
from utils.tree import Folder, Tree

WHOLE = [[1, 2, 30, 40]]


def load(root: Path, split: str = "training", **options: Any) -> LabelIndex:
    options = {"classes": None, "on_error": "error", "cache": root / f"cache_{split}.index", **options}
    return labels.load(Folder(root), split, **options)


def test_ids_classes_sizes_and_boxes(tmp_path: Path) -> None:
    write_example(tmp_path / "training", 12, [[0, 0, 10, 10], [1.5, 2.25, 64, 48]], ["dog", "cat"])
    write_example(tmp_path / "training", 7, [], [])
    write_example(tmp_path / "training", 100, [[3, 4, 5, 6.01]], ["cat"])
    (tmp_path / "training" / "images" / ".hidden.JPEG").touch()
    (tmp_path / "training" / "images" / "notes.txt").touch()
    index = load(tmp_path)
    assert index.classes == ("cat", "dog")
    assert index.ids.tolist() == [7, 12, 100]  # by number, not by text
    assert index.sizes.tolist() == [[64, 48]] * 3
    assert [index.target(i)[1].tolist() for i in range(3)] == [[], [2, 1], [1]]
    assert index.target(0)[0].shape == (0, 4)
    assert index.target(1)[0].tolist() == [[0, 0, 10, 10], [1.5, 2.25, 64, 48]]
    assert [images.decode(index.read(i), "").size for i in range(3)] == [(64, 48)] * 3
    assert index.shown(1) == f"{tmp_path}/training/images/12.JPEG"
    assert index.read(1) == (tmp_path / "training" / "images" / "12.JPEG").read_bytes()
    assert index.boxes.dtype == np.float64 and index.labels.dtype == index.ids.dtype == np.int64


def test_a_folder_labeled_in_between(tmp_path: Path) -> None:
    write_set(tmp_path / "labeled")
    assert len(load(tmp_path)) == 8
    assert load(tmp_path).shown(0) == f"{tmp_path}/labeled/training/images/1.JPEG"
    write_set(tmp_path)
    assert load(tmp_path).shown(0) == f"{tmp_path}/training/images/1.JPEG"


def test_where_the_classes_come_from(tmp_path: Path) -> None:
    write_set(tmp_path)
    write_example(tmp_path / "validation", 30009, WHOLE, ["dog"])
    assert load(tmp_path, "validation").classes == ("cat", "dog")  # of the training labels
    (tmp_path / "classes.txt").write_text("dog\n\ncat \neel\n")
    assert load(tmp_path, "validation").classes == ("dog", "cat", "eel")
    assert load(tmp_path, "validation").target(0)[1].tolist() == [2, 1]
    given = load(tmp_path, "validation", classes=("eel", "cat", "dog"))
    assert given.classes == ("eel", "cat", "dog")
    assert given.target(0)[1].tolist() == [2, 3]


def test_a_class_that_only_validation_has_is_unknown(tmp_path: Path) -> None:
    write_set(tmp_path)
    write_example(tmp_path / "validation", 30009, WHOLE, ["eel"])
    with pytest.raises(InputError, match=r"validation/labels/30009.yml: box 0: unknown class 'eel'"):
        load(tmp_path, "validation")


@pytest.mark.parametrize("text", ["", "cat\ndog\ncat\n"])
def test_classes_file_must_hold_distinct_names(tmp_path: Path, text: str) -> None:
    (tmp_path / "classes.txt").write_text(text)
    with pytest.raises(InputError, match="distinct name"):
        labels.read_classes(tmp_path / "classes.txt")


def test_classes_file_must_exist(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        labels.read_classes(tmp_path / "classes.txt")


def damage_unseen(label: Path) -> None:
    """Make a label file no YAML any more, of the same size and time: only who opens it notices."""
    before = label.stat()
    label.write_bytes(b"}" * before.st_size)
    os.utime(label, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_second_load_reads_the_cache_only(tmp_path: Path) -> None:
    write_set(tmp_path)
    first = load(tmp_path)
    damage_unseen(tmp_path / "training" / "labels" / "3.yml")
    second = load(tmp_path)
    assert [second.shown(i) for i in range(8)] == [f"{tmp_path}/training/images/{i}.JPEG" for i in range(1, 9)]
    for name in vars(first).keys() - {"tree", "numbers"}:  # the cache itself lies in the tree since the first load
        value = getattr(first, name)
        assert np.array_equal(getattr(second, name), value), name
        assert type(getattr(second, name)) is type(value), name


@pytest.mark.parametrize("change", ["label", "label time", "image added", "image replaced", "classes", "format", "cut"])
def test_a_stale_cache_is_not_used(tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_set(tmp_path)
    cache = tmp_path / "cache_training.index"
    options: dict[str, Any] = {}
    load(tmp_path)
    damage_unseen(tmp_path / "training" / "labels" / "3.yml")
    if change == "label":
        write_label(tmp_path / "training", 2, bboxes=WHOLE, labels=["dog"])
    elif change == "label time":
        os.utime(tmp_path / "training" / "labels" / "5.yml", ns=(0, 1))
    elif change == "image added":
        write_example(tmp_path / "training", 2000, WHOLE, ["dog"])
    elif change == "image replaced":
        Image.new("RGB", (32, 200)).save(tmp_path / "training" / "images" / "1.JPEG")
    elif change == "classes":
        options["classes"] = ("dog", "cat")
    elif change == "format":
        monkeypatch.setattr(labels, "FORMAT", labels.FORMAT + 1)
    else:
        cache.write_bytes(cache.read_bytes()[:500])
    with pytest.raises(InputError, match=r"training/labels/3.yml:1:1: bad YAML"):
        load(tmp_path, **options)


BROKEN_BOXES = [
    ([1, 2, 1, 40], "cat", "is empty or inverted"),
    ([1, 40, 30, 2], "cat", "is empty or inverted"),
    ([1, 2, 1.004, 40], "cat", "is empty or inverted"),
    ([float("nan"), 2, 30, 40], "cat", "is not finite"),
    ([1, 2, float("inf"), 40], "cat", "is not finite"),
    ([1, 2, 1e30, 40], "cat", "is not finite"),
    ([1, 2, 10**400, 40], "cat", "is not finite"),
    ([-0.02, 2, 30, 40], "cat", "is outside the image of 64x48"),
    ([1, 2, 30, 48.02], "cat", "is outside the image of 64x48"),
    ([1, 2, 64.02, 40], "cat", "is outside the image of 64x48"),
    ([1, 2, 30], "cat", "expected 4 numbers"),
    ("1 2 30 40", "cat", "expected 4 numbers"),
    ([1, 2, 30, True], "cat", "expected 4 numbers"),
    ([1, 2, 30, 40], "eel", "unknown class 'eel'"),
    ([1, 2, 30, 40], 0, "unknown class 0"),
    ([1, 2, 30, 40], ["cat"], r"unknown class \['cat'\]"),
]


@pytest.mark.parametrize(("box", "name", "reason"), BROKEN_BOXES)
def test_a_broken_box(tmp_path: Path, box: Any, name: Any, reason: str) -> None:
    write_set(tmp_path)
    write_label(tmp_path / "training", 4, bboxes=[WHOLE[0], box, WHOLE[0]], labels=["dog", name, "cat"])
    with pytest.raises(InputError, match=rf"1 unusable .*\n  training/labels/4.yml: box 1: .*{reason}"):
        load(tmp_path, classes=("cat", "dog"))
    index = load(tmp_path, classes=("cat", "dog"), on_error="skip")
    assert len(index) == 8 and len(index.problems) == 1
    boxes, numbers = index.target(3)
    assert boxes.tolist() == WHOLE * 2 and numbers.tolist() == [2, 1]


def test_rounding_may_put_a_box_past_the_edge(tmp_path: Path) -> None:
    write_set(tmp_path)
    write_label(tmp_path / "training", 4, bboxes=[[-0.01, 0, 64.01, 48.01]], labels=["dog"])
    assert load(tmp_path).target(3)[0].tolist() == [[-0.01, 0, 64.01, 48.01]]


BROKEN_LABELS = [
    ("bboxes: [[1, 2, 30, 40]]", "labels: expected a list, there is none"),
    ("labels: [cat]", "bboxes: expected a list, there is none"),
    ("bboxes:\nlabels: []", "bboxes: expected a list, got None"),
    ("bboxes: [[1, 2, 30, 40]]\nlabels: [cat, dog]", "1 bboxes but 2 labels"),
    (
        "bboxes: []\nlabels: []\nimage_size: [48, 64]",
        r"image_size is \[48, 64\], but the image has \[64, 48\]",
    ),
    ("bboxes: []\nlabels: []\nimage_size: large", "image_size is 'large', but"),
    ("- 1", r"expected keys and values, got \[1\]"),
    ("", "expected keys and values, got None"),
    ("bboxes: [1, 2", "bad YAML"),
    ("bboxes: []\nlabels: []\nlabels: [cat]", "bad YAML: key 'labels' stands twice"),
    ("? [a]\n: b", "bad YAML"),
    ("bboxes: !!python/object/apply:os.system [exit]", "bad YAML"),
    ("bboxes: []\nlabels: !!bool maybe", "bad YAML"),
    (f"bboxes: [[1, 2, 3, {'9' * 5000}]]", "bad YAML"),
    (f"bboxes: {'[' * 80000}{']' * 80000}", "bad YAML: nested more than"),
    (f"bboxes:\n  {'- ' * 80000}1", "bad YAML: nested more than"),
]


@pytest.mark.parametrize(("text", "reason"), BROKEN_LABELS)
def test_a_broken_label_file(tmp_path: Path, text: str, reason: str) -> None:
    write_set(tmp_path)
    (tmp_path / "training" / "labels" / "4.yml").write_text(text)
    with pytest.raises(InputError, match=rf"\n  training/labels/4.yml[:0-9]*: {reason}"):
        load(tmp_path)
    index = load(tmp_path, on_error="skip")
    assert index.ids.tolist() == [1, 2, 3, 5, 6, 7, 8] and len(index.problems) == 1
    assert index.target(3)[0][0].tolist() != WHOLE[0] and len(index.target(3)[0]) == 2  # offsets moved along


def test_every_problem_of_both_splits_is_in_one_error(tmp_path: Path) -> None:
    write_set(tmp_path)
    training, validation = tmp_path / "training", tmp_path / "validation"
    (training / "labels" / "2.yml").unlink()
    (training / "images" / "3.JPEG").unlink()
    (training / "images" / "four.JPEG").write_bytes((training / "images" / "4.JPEG").read_bytes())
    (training / "images" / "05.png").write_bytes((training / "images" / "5.JPEG").read_bytes())
    (training / "images" / "6.JPEG").write_bytes((training / "images" / "6.JPEG").read_bytes()[:300])
    write_label(training, 6, bboxes=[[9, 9, 8, 8]], labels=["cat"])
    (validation / "images" / "30001.JPEG").write_bytes(b"")
    caches = {split: tmp_path / f"{split}.index" for split in ("training", "validation")}
    with pytest.raises(InputError) as error:
        labels.load_splits(Folder(tmp_path), caches, classes=None, on_error="error")
    head, *lines, negatives, remedy = str(error.value).splitlines()
    assert head == f"{tmp_path}: 8 unusable images, labels or boxes"
    assert [line.split(": ", 1)[0].strip() for line in lines] == [
        "training/images/four.JPEG",
        "training/images/2.JPEG",
        "training/labels/3.yml",
        "training/images/05.png",
        "training/images/5.JPEG",
        "training/images/6.JPEG",
        "training/labels/6.yml",
        "validation/images/30001.JPEG",
    ]
    assert "training/images/1.JPEG" in negatives and "data.on_error=skip" in remedy
    indexes = labels.load_splits(Folder(tmp_path), caches, classes=None, on_error="skip")
    assert [index.ids.tolist() for index in indexes] == [[1, 4, 7, 8], [30002, 30003]]
    assert [len(index.problems) for index in indexes] == [7, 1]


def test_a_long_list_is_cut(tmp_path: Path) -> None:
    write_set(tmp_path)
    write_label(tmp_path / "training", 2, bboxes=[[5, 5, 5, 5]] * 70, labels=["cat"] * 70)
    with pytest.raises(InputError) as error:
        load(tmp_path)
    assert "70 unusable" in str(error.value) and "... and 20 more" in str(error.value)
    assert str(error.value).count("empty or inverted") == 50


@pytest.mark.parametrize("keep", ["nothing", "other split", "folders", "texts"])
def test_a_missing_or_empty_split(tmp_path: Path, keep: str) -> None:
    if keep == "other split":
        write_set(tmp_path, training=0)
    if keep in ("folders", "texts"):
        (tmp_path / "training" / "images").mkdir(parents=True)
        (tmp_path / "training" / "labels").mkdir(parents=True)
    if keep == "texts":
        write_label(tmp_path / "training", 1, bboxes=WHOLE, labels=["cat"])
    with pytest.raises(InputError, match=r"training/images: (No such file|no images)"):
        load(tmp_path)


def test_nothing_usable_is_an_error_even_when_skipping(tmp_path: Path) -> None:
    write_example(tmp_path / "training", 1, WHOLE, ["cat"])
    (tmp_path / "training" / "images" / "1.JPEG").write_bytes(b"")
    with pytest.raises(InputError, match="none of its images is usable"):
        load(tmp_path, on_error="skip")


def test_labels_without_a_single_class(tmp_path: Path) -> None:
    write_example(tmp_path / "training", 1, [], [])
    with pytest.raises(InputError, match="name no class"):
        load(tmp_path)


def test_no_torch_is_imported() -> None:
    code = "import sys, utils.labels; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def load_archive(tree: Tree, cache: Path, **options: Any) -> list[LabelIndex]:
    caches = {split: cache.with_name(f"{split}_{cache.name}") for split in ("training", "validation")}
    return labels.load_splits(tree, caches, **{"classes": None, "on_error": "error", **options})


def key_of(cache: Path) -> str:
    return json.loads(cache.read_bytes()[array_file.CRC :].partition(b"\n")[0])["key"]


def assert_same(one: LabelIndex, other: LabelIndex) -> None:
    for name in vars(one).keys() - {"tree"}:
        assert np.array_equal(getattr(one, name), getattr(other, name)), name
    assert [one.read(i) for i in range(len(one))] == [other.read(i) for i in range(len(other))]


@NEEDS_TOOLS
@pytest.mark.parametrize("place", [".", "labeled"])
def test_an_archive_gives_what_its_folder_gives(place: str, tmp_path: Path) -> None:
    root = tmp_path / "set"
    write_set(root / place)
    (root / place / "classes.txt").write_text("dog\ncat\n")
    write_label(root / place / "training", 4, bboxes=[[5, 5, 5, 9], [1, 2, 30, 40]], labels=["cat", "dog"])
    (root / place / "training" / "images" / "5.JPEG").write_bytes(b"")
    tree = archived(root, tmp_path)
    folder = load_archive(Folder(root), tmp_path / "f.index", on_error="skip")
    for _ in range(2):  # built, then cached
        archive = load_archive(tree, tmp_path / "a.index", on_error="skip")
        for one, other in zip(folder, archive, strict=True):
            assert_same(one, other)
    assert archive[0].classes == ("dog", "cat") and len(archive[0].problems) == 2
    assert archive[0].shown(2) == os.path.normpath(f"{tmp_path}/set.sqsh/{place}/training/images/3.JPEG")
    with pytest.raises(InputError) as error:
        load_archive(tree, tmp_path / "a.index")
    head, *lines, _, _ = str(error.value).splitlines()
    assert head.startswith(os.path.normpath(f"{tmp_path}/set.sqsh/{place}") + ": 2 unusable")
    assert lines[0].startswith("  training/labels/4.yml: box 0: [5, 5, 5, 9] is empty")
    assert lines[1].startswith("  training/images/5.JPEG: unreadable image: neither PNG")


@NEEDS_TOOLS
def test_a_cached_archive_is_not_looked_at(tmp_path: Path) -> None:
    tree = archived(write_set(tmp_path / "set"), tmp_path)
    first = load_archive(tree, tmp_path / "a.index")
    status = tree.path.stat()
    tree.path.write_bytes(bytes(status.st_size))
    os.utime(tree.path, ns=(status.st_atime_ns, status.st_mtime_ns))
    tree = Archive(tree.path, tree.fingerprint, tmp_path / "archive.npz")
    again = load_archive(tree, tmp_path / "a.index")
    assert [index.boxes.tolist() for index in again] == [index.boxes.tolist() for index in first]
    with pytest.raises(InputError):
        load_archive(tree, tmp_path / "other.index")


@NEEDS_TOOLS
@pytest.mark.parametrize("change", ["label", "image added", "classes", "format"])
def test_an_archive_of_another_content_is_indexed_anew(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_set(tmp_path / "set")
    tree, options = archived(root, tmp_path), dict[str, Any]()
    load_archive(tree, tmp_path / "a.index")
    key = key_of(tmp_path / "training_a.index")
    if change == "label":
        write_label(root / "training", 2, bboxes=WHOLE, labels=["dog"])
    elif change == "image added":
        write_example(root / "training", 2000, WHOLE, ["dog"])
    elif change == "classes":
        options["classes"] = ("dog", "cat")
    else:
        monkeypatch.setattr(labels, "FORMAT", labels.FORMAT + 1)
    if change in ("label", "image added"):
        tree.path.unlink()
        tree = archived(root, tmp_path)
    training, _ = load_archive(tree, tmp_path / "a.index", **options)
    assert key_of(tmp_path / "training_a.index") != key
    assert len(training) == 8 + (change == "image added")
    assert training.target(1)[0].tolist() != WHOLE or change == "label"
    assert training.classes == options.get("classes", ("cat", "dog"))


def test_files_that_come_beside_a_split_do_not_move_its_images(tmp_path: Path) -> None:
    root = write_set(tmp_path / "set")
    first = load(root, "validation", classes=("cat", "dog"), cache=tmp_path / "cache.index")
    damage_unseen(root / "validation" / "labels" / "30002.yml")
    write_example(root / "training", 999, WHOLE, ["dog"])
    (root / "a first file").touch()
    second = load(root, "validation", classes=("cat", "dog"), cache=tmp_path / "cache.index")
    assert second.numbers.tolist() == [number + 3 for number in first.numbers.tolist()]
    assert [second.read(i) for i in range(3)] == [first.read(i) for i in range(3)]


def test_classes_of_another_split_are_followed(tmp_path: Path) -> None:
    root = write_set(tmp_path / "set")
    assert load(root, "validation", cache=tmp_path / "cache.index").classes == ("cat", "dog")
    write_label(root / "training", 3, bboxes=WHOLE, labels=["eel"])
    assert load(root, "validation", cache=tmp_path / "cache.index").classes == ("cat", "dog", "eel")
    (root / "classes.txt").write_text("fox\ndog\ncat\n")
    assert load(root, "validation", cache=tmp_path / "cache.index").classes == ("fox", "dog", "cat")
    (root / "classes.txt").write_text("yak\ncat\ndog\n")
    assert load(root, "validation", cache=tmp_path / "cache.index").classes == ("yak", "cat", "dog")


@pytest.mark.realdata
@pytest.mark.parametrize("how", ["direct", "unpack"])
def test_exactly_the_planted_defects_are_found(tmp_path: Path, shared_data: Path, how: Stage) -> None:
    tree = squashfs.stage(shared_data / "dirty_labeled.sqsh", tmp_path / "staged", how=how)
    classes = labels.read_classes(shared_data / "classes" / "bccd_classes.txt")
    caches = {split: tmp_path / f"{split}.index" for split in ("training", "validation")}
    defects = json.loads((shared_data / "dirty_defects.json").read_text())["defects"]
    planted = {
        (defect["split"], defect["id"])
        for defect in defects
        # an empty list is how this layout says that there is nothing in the picture
        if defect["affects"] != "none" and defect["defect"] != "empty_label_list"
    }
    with pytest.raises(InputError) as error:
        labels.load_splits(tree, caches, classes=classes, on_error="error")
    lines = [line.strip() for line in str(error.value).splitlines() if line.startswith("  t") or line.startswith("  v")]
    listed = {(line.split("/")[0], int(line.split("/")[2].split(".")[0])) for line in lines}
    assert listed == planted and len(lines) == len(planted) == 11
    assert "training/images/28.JPEG" in str(error.value)
    training, validation = labels.load_splits(tree, caches, classes=classes, on_error="skip")
    lost = {number for split, number in planted if split == "training"} - {
        18,
        20,
        23,
        24,
        26,
    }  # those lose one box
    assert set(training.ids.tolist()) == set(range(1, 31)) - lost
    assert set(validation.ids.tolist()) == set(range(30001, 30011)) - {30002, 30005}
    assert len(training.problems) == 9 and len(validation.problems) == 2


@pytest.mark.realdata
def test_a_sound_real_set_has_no_problem(tmp_path: Path, shared_data: Path) -> None:
    tree = squashfs.stage(shared_data / "bccd_labeled.sqsh", tmp_path / "staged")
    index = labels.load(tree, "training", classes=None, on_error="error", cache=tmp_path / "cache.index")
    assert (len(index), len(index.boxes), index.classes) == (205, 2804, ("Platelets", "RBC", "WBC"))
    assert np.bincount(index.labels).tolist() == [0, 209, 2381, 214]
