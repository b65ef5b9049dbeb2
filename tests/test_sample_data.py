"""The generated demo data: real archives of the documented layout, exact boxes, the same bytes every time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from utils.errors import EnvironmentProblem, InputError
from utils.files import sha256
from utils.sample_data import Sample, make
from utils.sample_objects import CLASSES, DRAW, Array, Drawing, Patch, Rng
from utils.sample_scenes import scene

ROOT = Path(__file__).resolve().parent.parent
TINY = Sample(unlabeled=3, training=21, validation=4, size=80, seed=5)
ARCHIVES = ("labeled.sqsh", "unlabeled.sqsh")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    dest = tmp_path_factory.mktemp("sample")
    assert make(dest, TINY)
    return dest


@pytest.fixture(scope="module")
def unpacked(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("unpacked")
    for name in ARCHIVES:
        subprocess.run(["unsquashfs", "-q", "-n", "-f", "-d", root, made / name], check=True)
    return root


def test_archives_have_exactly_the_native_layout(made: Path, unpacked: Path) -> None:
    expected = {f"unlabeled/{number}.PNG" for number in range(3)}
    for split, ids in (("training", range(1, 22)), ("validation", range(30001, 30005))):
        expected |= {f"labeled/{split}/images/{number}.JPEG" for number in ids}
        expected |= {f"labeled/{split}/labels/{number}.yml" for number in ids}
    assert {str(path.relative_to(unpacked)) for path in unpacked.rglob("*") if path.is_file()} == expected
    assert sorted(path.name for path in made.iterdir()) == ["labeled.sqsh", "sample.json", "unlabeled.sqsh"]
    assert "gzip" in subprocess.check_output(["unsquashfs", "-s", made / "labeled.sqsh"], text=True)


def test_pictures_decode_and_labels_describe_them(unpacked: Path) -> None:
    shapes, seen = set(), set()
    for path in (unpacked / "labeled").rglob("*.yml"):
        label = yaml.safe_load(path.read_text())
        with Image.open(path.parent.parent / "images" / f"{path.stem}.JPEG") as picture:
            assert (picture.format, picture.mode) == ("JPEG", "RGB")
            assert list(picture.size) == label["image_size"]
        width, height = label["image_size"]
        assert set(label) == {"bboxes", "image_size", "labels"}
        assert len(label["bboxes"]) == len(label["labels"])
        assert (path.stem == "20") == (not label["labels"]), "one in twenty, of the training split, is empty"
        for xmin, ymin, xmax, ymax in label["bboxes"]:
            assert 0 <= xmin < xmax <= width and 0 <= ymin < ymax <= height
        shapes.add((width, height))
        seen.update(label["labels"])
    assert shapes == {(80, 80), (80, 64), (64, 80)}
    assert seen == set(CLASSES)
    for path in (unpacked / "unlabeled").iterdir():
        with Image.open(path) as picture:
            assert (picture.format, picture.mode, picture.size) == ("PNG", "RGB", (48, 48))


def painted(draw: Drawing, value: float) -> Drawing:
    """`draw` in one flat colour."""

    def flat(u: Array, v: Array, light: Array, rng: Rng) -> Patch:
        distance, rgb = draw(u, v, light, rng)
        return distance, np.full_like(rgb, value)

    return flat


@pytest.mark.parametrize("seed", range(4))
def test_boxes_fit_what_is_visible(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw a crowded scene with one object black, then white: the pictures differ where it is visible."""
    _, boxes, names = scene(np.random.default_rng(seed), 160, 120, 6)
    checked = 0
    for name, box in zip(names, boxes, strict=True):
        if names.count(name) > 1:
            continue
        pictures = []
        for value in (0.0, 1.0):
            with monkeypatch.context() as patch:
                patch.setitem(DRAW, name, painted(DRAW[name], value))
                picture, again, _ = scene(np.random.default_rng(seed), 160, 120, 6)
            assert again == boxes
            pictures.append(np.asarray(picture, float))
        changed = np.abs(pictures[1] - pictures[0]).max(-1) > 60
        y, x = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
        np.testing.assert_allclose([x[0], y[0], x[-1] + 1, y[-1] + 1], box, atol=2)
        checked += 1
    assert checked


def test_same_parameters_give_the_same_bytes_and_another_seed_does_not(made: Path, tmp_path: Path) -> None:
    subprocess.run(  # on one core: the number of processes must not matter
        [sys.executable, "-c", "import os; os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:1]);"
         "from utils.sample_data import main; main()", str(tmp_path),
         "--unlabeled=3", "--training=21", "--validation=4", "--size=80", "--seed=5"],
        cwd=ROOT, check=True, env={**os.environ, "TZ": "Asia/Tokyo"},
    )  # fmt: skip
    for name in ARCHIVES:
        assert sha256(tmp_path / name) == sha256(made / name)
    before = {name: sha256(tmp_path / name) for name in ARCHIVES}
    assert make(tmp_path, Sample(unlabeled=1, training=1, validation=1, size=64, seed=6)), "replaces its own"
    assert all(sha256(tmp_path / name) != before[name] for name in ARCHIVES)


def test_second_run_keeps_whole_archives_and_repairs_a_damaged_one(tmp_path: Path) -> None:
    sample = Sample(unlabeled=1, training=1, validation=1, size=64)
    make(tmp_path, sample)
    files = {path: path.stat().st_ino for path in tmp_path.iterdir()}
    hashes = {name: sha256(tmp_path / name) for name in ARCHIVES}
    assert not make(tmp_path, sample)
    assert {path: path.stat().st_ino for path in tmp_path.iterdir()} == files
    with open(tmp_path / "labeled.sqsh", "r+b") as archive:
        archive.truncate(100)
    assert make(tmp_path, sample)
    assert {name: sha256(tmp_path / name) for name in ARCHIVES} == hashes
    assert json.loads((tmp_path / "sample.json").read_text())["sha256"] == hashes


def test_archives_of_somebody_else_are_not_touched(tmp_path: Path) -> None:
    (tmp_path / "labeled.sqsh").write_bytes(b"mine")
    with pytest.raises(InputError, match="another folder"):
        make(tmp_path, TINY)
    assert (tmp_path / "labeled.sqsh").read_bytes() == b"mine"


def test_missing_mksquashfs_names_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EnvironmentProblem, match="squashfs-tools"):
        make(tmp_path / "data", TINY)
    assert not (tmp_path / "data").exists()


def test_impossible_amounts_end_the_command_with_2_and_all_reasons(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "utils.sample_data", str(tmp_path / "data"), "--training", "0", "--size", "8"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert "training = 0" in done.stderr and "size = 8" in done.stderr
    assert not (tmp_path / "data").exists()
