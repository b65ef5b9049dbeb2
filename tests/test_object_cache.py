"""Objects kept on a node's disk: whole, for all processes, and never more than the limit."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import time
from pathlib import Path

import pytest

from tests.gcs_server import Fault, Server, gcs, hasty
from utils import files, object_cache, storage, storage_write
from utils.errors import EnvironmentProblem, InputError
from utils.object_cache import Cache, fetch
from utils.storage import Info

__all__ = ["gcs", "hasty"]  # fixtures
MIB = 1 << 20


def put(gcs: Server, count: int, size: int, name: str = "x") -> dict[Info, bytes]:
    content = {f"{name}{number}": os.urandom(size) for number in range(count)}
    return {storage.info(gcs.put(name, data)): data for name, data in content.items()}


def taken(folder: Path) -> int:
    """Bytes that all objects take on the disk."""
    total = 0
    for path in folder.glob("*/**/*"):
        with contextlib.suppress(FileNotFoundError):  # by another process, just now
            total += path.stat().st_blocks * 512 if path.is_file() and path.name[0] != "." else 0
    return total


def age(folder: Path, seconds: float) -> None:
    for path in folder.glob("*/**/*"):
        os.utime(path, (time.time() - seconds,) * 2)


def test_each_object_is_asked_for_once(gcs: Server, tmp_path: Path) -> None:
    content = put(gcs, 8, 5000) | put(gcs, 1, 0, "empty")
    cache = Cache(tmp_path / "cache")
    cache.ahead(list(content)[:5])
    assert len(gcs.count("read")) == 5
    for again in (cache, cache, pickle.loads(pickle.dumps(cache))):
        assert {of: again.read(of) for of in content} == content
    assert set(gcs.count("read").values()) == {1}


def test_what_is_damaged_on_the_disk_is_asked_for_again(gcs: Server, tmp_path: Path) -> None:
    ((of, data),) = put(gcs, 1, 5000).items()
    cache = Cache(tmp_path / "cache")
    cache.read(of)
    (file,) = tmp_path.glob("cache/??/*")
    for damage in (data[:-1], bytes(5000), b""):
        file.write_bytes(damage)
        assert cache.read(of) == data == file.read_bytes()


def test_another_content_is_another_entry(gcs: Server, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    for data in (b"1", b"2"):
        assert cache.read(storage.info(gcs.put("x", data))) == data


def use(folder: Path, content: dict[Info, bytes], order: int) -> None:
    """Ends with 0 if all is read as it is and the cache was never over its limit."""
    cache = Cache(folder)
    numbered = list(content)
    for number in range(3 * len(numbered)):
        of = numbered[number * order % len(numbered)]
        assert cache.read(of) == content[of]
        with files.lock(folder / ".lock"):  # what is removed while it is counted would be counted
            assert taken(folder) <= 2 * MIB


def test_four_processes_keep_no_more_than_the_limit(
    gcs: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RELAY_CACHE_GIB", str(2 / 1024))
    monkeypatch.setattr(object_cache, "IDLE", 0.0)  # nothing may stay for ever
    monkeypatch.setattr(object_cache, "PAUSE", 0.0)
    content = put(gcs, 37, 99_000)
    children = [
        multiprocessing.get_context("fork").Process(target=use, args=(tmp_path / "cache", content, order))
        for order in (1, 5, 11, 17)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0] * 4
    assert taken(tmp_path / "cache") > MIB


def test_what_is_in_use_stays_and_what_was_used_longest_ago_goes(
    gcs: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RELAY_CACHE_GIB", str(1 / 1024))
    first, second, third = (list(put(gcs, 9, 99_000, name)) for name in "abc")
    cache = Cache(tmp_path / "cache")
    for of in first:
        cache.read(of)
    age(cache.folder, 7200)
    for of in [*first[:3], *second]:
        cache.read(of)
    gcs.requests.clear()
    for of in [*first[:3], *second[:6], *third]:
        cache.read(of)
    assert gcs.count("read") == {f"c{number}": 1 for number in range(9)} and 0.7 * MIB < taken(cache.folder) <= MIB


def test_objects_that_find_no_room_are_read_all_the_same_and_once(
    gcs: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RELAY_CACHE_GIB", "0")
    content = put(gcs, 4, 5000)
    cache = Cache(tmp_path / "cache")
    cache.ahead(list(content))
    assert {of: cache.read(of) for of in content} == content
    assert sum(gcs.count("read").values()) == 4 and not taken(cache.folder)
    with pytest.raises(EnvironmentProblem, match=r"no room for gs://bucket/x0.*larger RELAY_CACHE_GIB"):
        cache.file(next(iter(content)))
    monkeypatch.setenv("RELAY_CACHE_GIB", "much")
    with pytest.raises(InputError, match="RELAY_CACHE_GIB=much: expected a number"):
        Cache(tmp_path / "other").read(next(iter(content)))


def test_a_file_of_a_configuration_may_be_an_object(
    gcs: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here.pth").write_bytes(b"here")
    assert fetch(tmp_path / "here.pth", tmp_path) == fetch(f"file://{tmp_path}/here.pth", tmp_path)
    url = gcs.put("a/checkpoint_0003.pth", b"one")
    found = fetch(url, tmp_path)
    assert (found.name, found.read_bytes()) == ("checkpoint_0003.pth", b"one")
    assert fetch(url, tmp_path) == found and sum(gcs.count("read").values()) == 1
    gcs.put("a/checkpoint_0003.pth", b"two")
    assert fetch(url, tmp_path).read_bytes() == b"two"
    with pytest.raises(InputError, match="gs://bucket/none: not found"):
        fetch("gs://bucket/none", tmp_path)
    monkeypatch.setenv("RELAY_CACHE_GIB", str(1 / 1024))
    for name in "abc":
        storage_write.write(f"gs://bucket/{name}", bytes(700_000))
    small = put(gcs, 9, 99_000)
    for of in small:
        Cache(tmp_path / "objects").read(of)
    file = fetch("gs://bucket/a", tmp_path)  # for which objects in use make room, but no file does
    with pytest.raises(EnvironmentProblem, match="no room for gs://bucket/b"):
        fetch("gs://bucket/b", tmp_path)
    assert file.stat().st_size == 700_000
    age(tmp_path / "objects", 7200)
    assert fetch("gs://bucket/c", tmp_path).stat().st_size == 700_000 and not file.exists()
    assert taken(tmp_path / "objects") <= MIB


def test_a_file_cut_on_its_way_is_never_under_its_name(gcs: Server, tmp_path: Path, hasty: None) -> None:
    url = gcs.put("x.pth", bytes(1000))
    gcs.faults = [Fault(cut="length")]
    with pytest.raises(EnvironmentProblem, match=r"gs://bucket/x\.pth: cut short"):
        fetch(url, tmp_path)
    assert not list(tmp_path.rglob("x.pth"))
