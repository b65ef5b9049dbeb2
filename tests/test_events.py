"""TensorBoard's files: the numbers of metrics.jsonl whatever interrupted a run, and pictures of what it sees."""

from __future__ import annotations

import contextlib
import io
import json
import re
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

from detect_train import pictures
from ssl_train.data import Share, Views
from ssl_train.pictures import ABOUT, pairs
from tests.labeled_set import write_set
from tests.test_ssl_data import SETTINGS, write_images
from utils import image_cache, labels, metrics
from utils.metrics import MetricsWriter
from utils.paths import RunDir
from utils.tree import Folder

EVERYTHING = {"scalars": 0, "images": 0}  # and no sample of it


def events(run: Path) -> EventAccumulator:
    return EventAccumulator(str(RunDir(run).tensorboard), tensor_size_guidance=EVERYTHING).Reload()


def scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard's own reader finds: by tag, (step, value)."""
    found = events(run)
    tags = [tag for tag in found.Tags()["tensors"] if found.SummaryMetadata(tag).plugin_data.plugin_name == "scalars"]
    return {tag: [(each.step, make_ndarray(each.tensor_proto).item()) for each in found.Tensors(tag)] for tag in tags}


def in_metrics(run: Path) -> dict[str, list[tuple[int, float]]]:
    """The same from metrics.jsonl, as float32."""
    expected: dict[str, list[tuple[int, float]]] = {}
    for record in metrics.read(RunDir(run).metrics):
        for name, value in metrics.numbers(record).items():
            expected.setdefault(f"{record['kind']}/{name}", []).append((record["step"], float(np.float32(value))))
    return expected


def picture_steps(run: Path, tag: str) -> list[int]:
    """The steps of a tag's pictures, each of which can be decoded."""
    found = events(run).Tensors(tag)
    for each in found:
        width, height, content = each.tensor_proto.string_val
        assert Image.open(io.BytesIO(content)).size == (int(width), int(height))
    return [each.step for each in found]


def write(writer: MetricsWriter, epoch: int, steps: range, start: float) -> None:
    for step in steps:
        writer.write("train", epoch=epoch, step=step, lr=0.1, left_s=None, steps=9, loss=start / step)


def test_each_step_is_there_once_after_kills(tmp_path: Path) -> None:
    """Killed after step 5 with a checkpoint of step 3, and once more in the middle of an event."""
    writer = MetricsWriter(RunDir(tmp_path), epoch=0, step=0)
    write(writer, 0, range(1, 4), 1.0)
    writer.write("val", epoch=0, step=3, AP=0.25, best=True, recall_per_class={"cat": 1.0})
    write(writer, 1, range(4, 6), 2.0)
    second = MetricsWriter(RunDir(tmp_path), epoch=1, step=3)
    write(second, 1, range(4, 7), 3.0)
    newest = max(RunDir(tmp_path).tensorboard.iterdir())
    newest.write_bytes(newest.read_bytes()[:-7])
    third = MetricsWriter(RunDir(tmp_path), epoch=1, step=5)
    write(third, 1, range(6, 8), 4.0)
    assert scalars(tmp_path) == in_metrics(tmp_path)
    assert scalars(tmp_path).keys() == {"train/lr", "train/loss", "val/AP"}
    assert scalars(tmp_path)["train/loss"] == [
        (step, pytest.approx(start / step)) for step, start in enumerate([1, 1, 1, 3, 3, 4, 4], start=1)
    ]


def test_views_in_the_picture_are_those_that_are_trained_with(tmp_path: Path) -> None:
    images = image_cache.of(Folder(write_images(tmp_path / "images")), None, 0)
    views, chosen = Views(images, **SETTINGS), np.array([5, 0, 3])
    batch = views.__getitems__(Share(4, np.array([1, 5, 0, 3]), np.array([3, 5, 2, 0]), np.arange(4)))
    picture = np.asarray(pairs(views, 4, chosen))
    side = SETTINGS["image_size"]
    assert picture.shape == (2 * side + 2, 3 * side + 4, 3)
    for column, (query, key) in enumerate([(1, 1), (2, 3), (3, 0)]):
        left = column * (side + 2)
        assert np.array_equal(picture[:side, left : left + side], batch.query[query].numpy())
        assert np.array_equal(picture[side + 2 :, left : left + side], batch.key[key].numpy())


def test_the_best_detections_lie_over_the_objects(tmp_path: Path) -> None:
    """Images of 64 x 48 in cells of 320 x 240: five pixels for one."""
    tree = Folder(write_set(tmp_path, training=2, validation=9))
    caches = {"validation": tmp_path / "validation.index"}
    (index,) = labels.load_splits(tree, caches, classes=None, on_error="error")
    first, third = index.ids[[0, 3]].tolist()
    rows = [
        [first, 40, 30, 60, 44, 0.9, 2],
        [first, 30, 30, 38, 44, 0.8, 1],
        [first, 2, 40, 12, 46, 0.7, 1],  # one more than there are objects
        [third, 44, 32, 60, 44, 0.1, 1],  # the third of nine images
    ]
    picture = np.asarray(pictures.over_truth(index, np.array(rows)))
    assert picture.shape == (482, 642, 3)

    def at(cell: tuple[int, int], x: float, y: float) -> tuple[int, ...]:
        return tuple(picture[cell[0] * 242 + round(5 * y), cell[1] * 322 + round(5 * x)].tolist())

    x, y = index.boxes[0][:2]
    assert at((0, 0), x, y) == pictures.TRUTH
    assert at((0, 0), 40, 44) == at((0, 0), 30, 44) == pictures.DETECTION
    assert at((0, 0), 2, 46) != pictures.DETECTION
    assert at((0, 1), 44, 44) == pictures.DETECTION != at((0, 1), 30, 44), "another image's"


@contextlib.contextmanager
def tensorboard(command: list[str], log: Path, **how: Any) -> Iterator[Callable[..., bytes]]:
    """TensorBoard, started by `command`: what it answers to a path and a query."""
    with open(log, "w") as file, subprocess.Popen(command, stdout=file, stderr=file, **how) as server:
        try:
            said = _until(lambda: re.search(r"http://\S+:\d+/", log.read_text()), server, log)
            yield lambda path, **query: _answer(f"{said[0]}data/plugin/{path}?{urllib.parse.urlencode(query)}")
        finally:
            server.terminate()


def tags(asked: Callable[..., bytes], plugin: str) -> Any:
    """By run, a plugin's tags, once TensorBoard has read something: it does so in the background."""
    for _ in range(600):
        if found := json.loads(asked(f"{plugin}/tags")):
            return found
        time.sleep(0.1)
    raise AssertionError("nothing was read")


def _answer(url: str) -> bytes:
    with urllib.request.urlopen(url) as answer:
        return bytes(answer.read())


def _until(look: Callable[[], Any], server: subprocess.Popen[bytes], log: Path) -> Any:
    for _ in range(600):
        if found := look():
            return found
        assert server.poll() is None, log.read_text()
        time.sleep(0.1)
    raise AssertionError(log.read_text())


def test_tensorboard_shows_a_chain(tmp_path: Path) -> None:
    writer = MetricsWriter(RunDir(tmp_path / "r1"), epoch=0, step=0)
    writer.write("val", epoch=0, step=8, AP=0.5)
    writer.events.picture("views", Image.new("RGB", (12, 8), "red"), ABOUT, 8)
    program = str(Path(sys.executable).parent / "tensorboard")
    command = [program, "--logdir", str(tmp_path), "--host", "127.0.0.1", "--port", "0"]
    with tensorboard(command, tmp_path / "log") as asked:
        ((run, found),) = tags(asked, "images").items()
        assert run == "r1/tensorboard" and ABOUT in found["views"]["description"]
        points = json.loads(asked("scalars/scalars", run=run, tag="val/AP"))
        assert [point[1:] for point in points] == [[8, 0.5]]
        (shown,) = json.loads(asked("images/images", run=run, tag="views", sample=0))
        content = asked("images/individualImage", **dict(urllib.parse.parse_qsl(shown["query"])))
        assert Image.open(io.BytesIO(content)).size == (12, 8)
