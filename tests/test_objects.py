"""Data in a bucket, object by object: listed once, fetched once, the same over a connection that breaks."""

from __future__ import annotations

import functools
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.data import DataLoader

from ssl_train import train
from tests.archives import read_one
from tests.gcs_server import Fault, Server, gcs, hasty
from tests.labeled_set import write_set
from tests.test_archive import Contents, whole
from tests.test_ssl_train import SMALL, records, write_images
from utils import image_cache, labels, squashfs, storage_write
from utils.errors import InputError
from utils.objects import Objects
from utils.paths import ROOT
from utils.tree import TOO_LARGE, Folder

__all__ = ["gcs", "hasty"]  # fixtures


def upload(gcs: Server, folder: Path, prefix: str = "set") -> str:
    for path in folder.rglob("*"):
        if path.is_file():
            gcs.put(f"{prefix}/{path.relative_to(folder)}", path.read_bytes())
    return f"gs://bucket/{prefix}"


def staged(url: str, place: Path) -> Objects:
    tree = squashfs.stage(url, place / "staged", place / "archives")
    assert isinstance(tree, Objects)
    return tree


def pretrain(run: Path, data: str, *words: str) -> dict[str, Any]:
    flags = ["--run-dir", str(run), "--dataset-root", data, "--epochs", "2"]
    return train.main([*flags, *SMALL, "workers=2", *words])


def test_objects_are_the_files_of_the_folder(gcs: Server, tmp_path: Path) -> None:
    for name in ("a/1.png", "a/b/10.PNG", "a/b/9.png", "a.yml", "a/.hidden", "d\u00e9ep/x y#1.png"):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).write_bytes(os.urandom(10))
    url, theirs = upload(gcs, tmp_path / "set"), Folder(tmp_path / "set")
    ours = staged(f"{url}/", tmp_path)
    assert [ours.name(number) for number in range(len(ours))] == [theirs.name(number) for number in range(len(theirs))]
    for how in ({}, {"folder": "a"}, {"folder": "a", "deep": False}, {"suffixes": (".png",)}):
        assert ours.find(**how).tolist() == theirs.find(**how).tolist()
    assert [ours.read(number) for number in range(len(ours))] == [theirs.read(number) for number in range(len(theirs))]
    assert (str(ours), ours.shown(0)) == (url, f"{url}/a.yml") and ours.stamp(0)[0] == 10


def test_what_is_there_is_listed_once(gcs: Server, tmp_path: Path) -> None:
    url = upload(gcs, write_images(tmp_path / "images", 5))
    first = staged(url, tmp_path)
    listed = gcs.count("list")
    gcs.put("set/new.png", b"later")
    shutil.rmtree(tmp_path / "staged")  # another node
    again = staged(url, tmp_path)
    assert len(again) == 5 and again.fingerprint == first.fingerprint
    assert gcs.count("list")["set/"] == listed["set/"] + 1  # to see that it is no object
    with pytest.raises(InputError, match=r"gs://bucket/none: not found"):
        staged("gs://bucket/none", tmp_path)


def test_the_fingerprint_is_that_of_the_content(gcs: Server, tmp_path: Path) -> None:
    url = upload(gcs, write_images(tmp_path / "images", 3))
    prints = [staged(url, tmp_path / "1").fingerprint]
    upload(gcs, tmp_path / "images")
    prints.append(staged(url, tmp_path / "2").fingerprint)
    gcs.put("set/1.png", b"x" * (tmp_path / "images" / "1.png").stat().st_size)
    prints.append(staged(url, tmp_path / "3").fingerprint)
    assert prints[0] == prints[1] != prints[2]
    (list_of_it,) = (tmp_path / "1" / "archives").glob("*.list")
    list_of_it.unlink()
    with pytest.raises(InputError, match=r"gs://bucket/set: not the data this chain began with"):
        staged(url, tmp_path / "1")


def test_a_changed_object_is_refused(gcs: Server, tmp_path: Path) -> None:
    tree = staged(upload(gcs, write_images(tmp_path / "images", 3)), tmp_path)
    kept = tree.read(0)
    for name, content in {"0.png": b"other", "1.png": b"other", "2.png": None}.items():
        gcs.put(f"set/{name}", content) if content else storage_write.delete([f"gs://bucket/set/{name}"])
    assert tree.read(0) == kept  # as it was listed
    for number, reason in ((1, "changed since it was listed"), (2, "gone, or written again")):
        with pytest.raises(InputError, match=f"gs://bucket/set/{number}.png: {reason}"):
            tree.read(number)
        with pytest.raises(InputError, match=f"gs://bucket/set/{number}.png: {reason}"):
            tree.ahead([number])


def test_too_large_an_object_is_said_and_not_fetched(gcs: Server, tmp_path: Path, monkeypatch: Any) -> None:
    tree = staged(upload(gcs, write_images(tmp_path / "images", 1)), tmp_path)
    monkeypatch.setattr("utils.objects.LARGEST", 10)
    tree.ahead([0])
    with pytest.raises(InputError, match=f"0.png: {TOO_LARGE}"):
        tree.read(0)
    assert tree.problem(0) == TOO_LARGE and not gcs.count("read")


@pytest.mark.parametrize("how", ["fork", "spawn"])
def test_loader_processes_read_at_once(how: str, gcs: Server, tmp_path: Path) -> None:
    tree = staged(upload(gcs, write_images(tmp_path / "images", 12)), tmp_path)
    expected = [path.read_bytes() for path in sorted((tmp_path / "images").iterdir())]
    assert tree.read(0) == expected[0]  # this process has the storage open when it forks
    context: Any = multiprocessing.get_context(how)
    loader = DataLoader(
        Contents(tree), batch_size=3, num_workers=2, collate_fn=whole, multiprocessing_context=context
    )  # fmt: skip
    if how == "fork":
        assert [content for batch in loader for content in batch] == expected
    with context.Pool(2) as pool:
        assert pool.map(functools.partial(read_one, tree), range(12)) == expected
    assert tree.read(11) == expected[11]
    assert len(pickle.dumps(tree)) < 1000  # no list, no connection


def test_a_list_that_changed_is_refused_by_a_process_that_is_sent_it(gcs: Server, tmp_path: Path) -> None:
    tree = staged(upload(gcs, write_images(tmp_path / "images", 3)), tmp_path)
    sent = pickle.dumps(tree)
    next((tmp_path / "archives").glob("*.list")).unlink()
    gcs.put("set/new.png", b"later")
    with pytest.raises(InputError, match=r"its list .* changed while it was in use"):
        pickle.loads(sent)


def test_pretraining_fetches_each_image_once_and_is_as_from_a_folder(gcs: Server, tmp_path: Path, hasty: None) -> None:
    folder = write_images(tmp_path / "images")
    url = upload(gcs, folder)
    expected = pretrain(tmp_path / "folder" / "run", str(folder))
    result = pretrain(tmp_path / "one" / "run", url)
    assert result["metrics"] == expected["metrics"]
    assert records(tmp_path / "one" / "run") == records(tmp_path / "folder" / "run")
    assert gcs.count("read", bad=True) == {f"set/{number}.png": 1 for number in range(14)}
    gcs.requests.clear()
    fault = Fault("read list info", status=503, share=0.2)
    gcs.faults = [fault]
    result = pretrain(tmp_path / "two" / "run", url)
    assert records(tmp_path / "two" / "run") == records(tmp_path / "one" / "run") and fault.hits
    assert gcs.count("read") == {f"set/{number}.png": 1 for number in range(14)}


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (Fault(status=503), "the storage fails (HTTP 503), also after several tries; try again later"),
        (Fault(status=401), "no access with these credentials (HTTP 401); run `gcloud auth application-default login`"),
    ],
    ids=["503", "401"],
)
def test_a_storage_that_does_not_come_back_ends_the_program_with_75(
    fault: Fault, said: str, gcs: Server, tmp_path: Path
) -> None:
    gcs.faults = [fault]
    url = upload(gcs, write_images(tmp_path / "images", 4))
    impatient = (
        "import asyncio, types, gcsfs.retry; from utils.errors import cli; from ssl_train import train;"
        "gcsfs.retry.asyncio = types.SimpleNamespace(sleep=lambda seconds: asyncio.sleep(0)); cli(train.main)"
    )
    command = [sys.executable, "-c", impatient, "--run-dir", str(tmp_path / "run"), "--dataset-root", url, *SMALL]
    ended = subprocess.run([*command, "workers=2"], cwd=ROOT, capture_output=True, text=True)
    errors = [line for line in ended.stderr.splitlines() if not line.startswith("listing ")]
    assert ended.returncode == 75 and len(errors) == 1
    assert errors[0].startswith("ERROR 75: gs://bucket/set/") and said in errors[0]


def test_labels_are_read_from_a_bucket(gcs: Server, tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set", training=6, validation=2)
    tree = staged(upload(gcs, folder), tmp_path)
    how: Any = {"classes": None, "on_error": "error"}
    ours = labels.load(tree, "training", **how, cache=tmp_path / "ours")
    theirs = labels.load(Folder(folder), "training", **how, cache=tmp_path / "theirs")
    assert ours.classes == theirs.classes and (ours.boxes == theirs.boxes).all() and (ours.ids == theirs.ids).all()
    ours.ahead(range(len(ours)))
    assert [ours.read(i) for i in range(len(ours))] == [theirs.read(i) for i in range(len(theirs))]
    assert set(gcs.count("read").values()) == {1}
    gcs.put("classes.txt", b"dog\ncat\n")
    assert labels.read_classes("gs://bucket/classes.txt") == ("dog", "cat")
    with pytest.raises(InputError, match=r"gs://bucket/no.txt: not found"):
        labels.read_classes("gs://bucket/no.txt")


def test_pixels_are_kept_on_a_disk_only(gcs: Server, tmp_path: Path) -> None:
    tree = staged(upload(gcs, write_images(tmp_path / "images", 3)), tmp_path)
    with pytest.raises(InputError, match=r"data\.cache=gs://bucket/cache: .*give a folder on a disk"):
        image_cache.of(tree, "gs://bucket/cache", 0)
    cached = image_cache.of(tree, str(tmp_path / "cache"), 0)
    expected = image_cache.of(Folder(tmp_path / "images"), None, 0)
    assert all(np.array_equal(cached.pixels(index), expected.pixels(index)) for index in range(3))
    assert set(gcs.count("read").values()) == {1}
