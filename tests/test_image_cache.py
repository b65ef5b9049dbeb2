"""The cache of decoded images: the same pixels, built once, whole or not there."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from utils import image_cache, stop
from utils.errors import EnvironmentProblem, InputError, Stopped
from utils.image_cache import Cached, Decoded
from utils.tree import Folder

SIZES = ((40, 30), (17, 23), (64, 8))  # width, height


def write_images(folder: Path, count: int = 9, *, same: bool = False) -> Path:
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for number in range(count):
        width, height = SIZES[0 if same else number % 3]
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        image = Image.fromarray(pixels) if number % 2 else Image.fromarray(pixels[..., 0])  # gray ones too
        image.save(folder / f"{number}.{'jpg' if number % 3 == 0 else 'png'}")
    return folder


@pytest.mark.parametrize("workers", [0, 2])
def test_the_cache_has_the_pixels_that_decoding_gives(tmp_path: Path, workers: int) -> None:
    tree = Folder(write_images(tmp_path / "images", 200))
    decoded, cached = Decoded(tree), image_cache.of(tree, str(tmp_path / "cache"), workers)
    assert isinstance(cached, Cached) and len(cached) == len(decoded) == 200
    for index in range(200):
        assert np.array_equal(cached.pixels(index), decoded.pixels(index))
        assert cached.shown(index) == decoded.shown(index)
    assert cached.same_size is None


def test_images_of_one_size_are_known_to_be(tmp_path: Path) -> None:
    tree = Folder(write_images(tmp_path / "images", same=True))
    assert image_cache.of(tree, str(tmp_path / "cache"), 0).same_size == (30, 40)
    assert Decoded(tree).same_size is None


def test_writing_to_pixels_does_not_change_the_cache(tmp_path: Path) -> None:
    tree = Folder(write_images(tmp_path / "images"))
    before = image_cache.of(tree, str(tmp_path / "cache"), 0).pixels(3)
    expected = before.copy()
    before[:] = 7
    assert np.array_equal(image_cache.of(tree, str(tmp_path / "cache"), 0).pixels(3), expected)


def _pixels(images: image_cache.Images) -> bytes:
    return images.pixels(4).tobytes()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_read_it(tmp_path: Path, method: str) -> None:
    tree = Folder(write_images(tmp_path / "images"))
    cached = image_cache.of(tree, str(tmp_path / "cache"), 0)
    expected = _pixels(cached)  # it is mapped here now
    assert len(pickle.dumps(cached)) < 5000
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.apply(_pixels, (cached,)) == expected


def test_it_is_built_once_and_anew_for_other_data(tmp_path: Path) -> None:
    folder, cache = write_images(tmp_path / "images"), tmp_path / "cache"
    image_cache.of(Folder(folder), str(cache), 0)
    (first,) = (place for place in cache.iterdir() if place.is_dir())
    before = (first / "pixels").stat()
    assert len(image_cache.of(Folder(folder), str(cache), 0)) == 9
    assert (first / "pixels").stat().st_mtime_ns == before.st_mtime_ns
    Image.new("RGB", (5, 5), (1, 2, 3)).save(folder / "0a.png")
    assert image_cache.of(Folder(folder), str(cache), 0).pixels(1).shape == (5, 5, 3)
    assert sum(place.is_dir() for place in cache.iterdir()) == 2


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_cannot_be_decoded_is_named_and_leaves_no_cache(tmp_path: Path, workers: int) -> None:
    folder, cache = write_images(tmp_path / "images"), tmp_path / "cache"
    broken = folder / "4.png"
    whole = broken.read_bytes()
    middle = len(whole) // 2
    for content in (b"no image", whole[:middle] + b"damaged" + whole[middle + 7 :]):  # the first pass, the second
        broken.write_bytes(content)
        with pytest.raises(InputError, match=str(broken)):
            image_cache.of(Folder(folder), str(cache), workers)
        assert not [place for place in cache.iterdir() if place.is_dir()]


def test_a_full_disk_is_said_before_anything_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = Folder(write_images(tmp_path / "images"))
    monkeypatch.setattr("utils.files.free_space", lambda folder: 1000)
    with pytest.raises(EnvironmentProblem, match=rf"disk full.*needs 0\.000 GiB, {tmp_path}/cache has"):
        image_cache.of(tree, str(tmp_path / "cache"), 0)
    assert not [place for place in (tmp_path / "cache").iterdir() if place.is_dir()]


def test_a_damaged_cache_is_refused_and_named(tmp_path: Path) -> None:
    tree = Folder(write_images(tmp_path / "images"))
    cached = image_cache.of(tree, str(tmp_path / "cache"), 0)
    assert isinstance(cached, Cached)
    os.truncate(cached.place / "pixels", 100)
    with pytest.raises(InputError, match=rf"{cached.place}: damaged cache"):
        image_cache.of(tree, str(tmp_path / "cache"), 0)
    (cached.place / "index.npz").write_bytes(b"PK no index")
    with pytest.raises(InputError, match=rf"{cached.place}: damaged cache"):
        image_cache.of(tree, str(tmp_path / "cache"), 0)


def test_a_folder_that_others_can_write_to_is_refused(tmp_path: Path) -> None:
    tree = Folder(write_images(tmp_path / "images"))
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    with pytest.raises(EnvironmentProblem, match="others can write there"):
        image_cache.of(tree, str(tmp_path / "cache"), 0)


def test_data_without_an_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(InputError, match=rf"{tmp_path}: no PNG or JPEG"):
        image_cache.of(Folder(tmp_path), None, 0)


def test_a_signal_ends_the_building(tmp_path: Path) -> None:
    tree = Folder(write_images(tmp_path / "images"))
    with stop.listening():
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stopped, match="SIGTERM"):
            image_cache.of(tree, str(tmp_path / "cache"), 0)
    assert len(image_cache.of(tree, str(tmp_path / "cache"), 0)) == 9


def test_two_processes_build_it_once_and_a_killed_one_is_cleaned_up_after(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tree, cache = Folder(write_images(tmp_path / "images", 600)), tmp_path / "cache"
    fork = multiprocessing.get_context("fork")

    def begin() -> multiprocessing.process.BaseProcess:
        process = fork.Process(target=image_cache.of, args=(tree, str(cache), 0))
        process.start()
        return process

    killed = begin()
    while not list(cache.glob(".*/pixels")):
        assert killed.is_alive()
        time.sleep(0.001)
    killed.kill()
    killed.join()
    assert not [place for place in cache.iterdir() if not place.name.startswith(".")]
    capfd.readouterr()
    both = [begin(), begin()]
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert capfd.readouterr().err.count("decode") == 1
    assert [place.suffix for place in cache.iterdir() if place.name.startswith(".")] == [".lock"]
    assert len(image_cache.of(tree, str(cache), 0)) == 600
