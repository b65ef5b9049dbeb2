"""An archive in a bucket: copied or read where it is, the same bytes, numbers and fingerprint as on a disk."""

from __future__ import annotations

import functools
import multiprocessing
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

from ssl_train import train
from tests.archives import NEEDS_TOOLS, make_lengths, pack, read_one
from tests.gcs_server import Fault, Server, gcs, hasty
from tests.test_archive import Contents, assert_same, whole
from tests.test_ssl_train import SMALL, records, write_images
from utils import squashfs, squashfs_source, storage
from utils.archive import Archive
from utils.errors import EnvironmentProblem, InputError
from utils.files import sha256
from utils.tree import Folder, Tree

__all__ = ["gcs", "hasty"]  # fixtures
pytestmark = NEEDS_TOOLS
TINY = "0.00001"  # GiB: 10 KB


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return pack(make_lengths(tmp_path / "source", 4096), tmp_path / "a.sqsh", "-b", "4096", "-comp", "zstd")


def upload(gcs: Server, archive: Path) -> str:
    return gcs.put(f"data/{archive.name}", archive.read_bytes())


def staged(url: str, place: Path, how: Any = "direct") -> Tree:
    return squashfs.stage(url, place / "staged", place / "archives", how)


def in_place(url: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> Archive:
    with monkeypatch.context() as patch:
        patch.setenv("RELAY_CACHE_GIB", TINY)
        tree = staged(url, place)
    assert isinstance(tree, Archive) and not list(place.glob("staged/*.sqsh"))
    return tree


@pytest.mark.parametrize(
    "options", ["-comp zstd", "-noI -noD -noF", "-comp gzip -no-fragments", "-always-use-fragments"]
)
def test_both_ways_give_what_the_local_archive_gives(
    options: str, gcs: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(squashfs_source, "NEAR", 3000)
    source = make_lengths(tmp_path / "source", 4096)
    archive = pack(source, tmp_path / "a.sqsh", "-b", "4096", *options.split())
    url, local = upload(gcs, archive), squashfs.stage(archive, tmp_path / "local")
    remote = in_place(url, tmp_path / "1", monkeypatch)
    assert_same(remote, local)
    copied = staged(url, tmp_path / "2")
    assert isinstance(copied, Archive) and copied.path.read_bytes() == archive.read_bytes()
    assert_same(copied, local)
    assert remote.fingerprint == copied.fingerprint and str(remote) == str(copied) == url
    assert remote.shown(0) == f"{url}/{local.name(0)}"


def test_what_will_be_read_is_asked_for_at_once_and_only_that(
    archive: Path, gcs: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = in_place(upload(gcs, archive), tmp_path / "1", monkeypatch)
    local = squashfs.stage(archive, tmp_path / "local")
    numbers = [number for number in range(0, len(local), 3) if local.problem(number) is None]
    gcs.requests.clear()
    remote.ahead(numbers)
    asked = len(gcs.requests)
    assert [remote.read(number) for number in numbers] == [local.read(number) for number in numbers]
    assert len(gcs.requests) == asked
    assert 0 < sum(request.bytes for request in gcs.requests) < archive.stat().st_size


def test_the_sha256_beside_it_is_its_fingerprint_as_on_a_disk(
    archive: Path, gcs: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = upload(gcs, archive)
    gcs.put("data/a.sqsh.sha256", f"{sha256(archive)}  a.sqsh\n".encode())
    trees = [
        in_place(url, tmp_path / "1", monkeypatch),
        *(staged(url, tmp_path / how, how) for how in ("direct", "unpack")),
    ]
    assert {tree.fingerprint for tree in trees} == {sha256(archive)}
    gcs.put("data/a.sqsh.sha256", b"0" * 64)
    with pytest.raises(InputError, match=r"gs://bucket/data/a.sqsh: damaged or exchanged: its sha256 is"):
        staged(url, tmp_path / "other")
    assert not list((tmp_path / "other" / "staged").glob("*.sqsh"))


def test_it_is_unpacked_after_it_was_copied(archive: Path, gcs: Server, tmp_path: Path) -> None:
    url = upload(gcs, archive)
    unpacked, direct = staged(url, tmp_path, "unpack"), staged(url, tmp_path)
    assert isinstance(unpacked, Folder) and unpacked.fingerprint == direct.fingerprint
    assert_same(direct, unpacked)
    before = len(gcs.count("read"))
    assert staged(url, tmp_path, "unpack").fingerprint == direct.fingerprint and len(gcs.count("read")) == before


def test_a_copy_that_is_needed_and_does_not_fit_is_said(
    archive: Path, gcs: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RELAY_CACHE_GIB", TINY)
    with pytest.raises(EnvironmentProblem, match=r"gs://bucket/data/a.sqsh needs .*see RELAY_CACHE_GIB"):
        staged(upload(gcs, archive), tmp_path, "unpack")


def stage_and_count(url: str, place: Path) -> int:
    return len(staged(url, place))


def test_the_processes_of_a_node_copy_it_once(archive: Path, gcs: Server, tmp_path: Path) -> None:
    url = upload(gcs, archive)
    with multiprocessing.get_context("fork").Pool(3) as pool:
        lengths = pool.starmap(stage_and_count, [(url, tmp_path)] * 3, chunksize=1)
    assert len(set(lengths)) == 1
    whole_reads = [one for one in gcs.requests if one.kind == "read" and one.bytes == archive.stat().st_size]
    assert len(whole_reads) == 1


@pytest.mark.parametrize("cut", ["body", "length"])
def test_a_copy_cut_on_its_way_is_fetched_again(
    cut: str, archive: Path, gcs: Server, tmp_path: Path, hasty: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "PIECE", 10_000)
    url = upload(gcs, archive)
    fault = Fault(cut=cut, share=0.3, first=4)
    gcs.faults = [fault]
    tree = staged(url, tmp_path)
    assert fault.hits and isinstance(tree, Archive) and tree.path.read_bytes() == archive.read_bytes()


@pytest.mark.parametrize("how", ["fork", "spawn"])
def test_loader_processes_read_in_place(
    how: str, archive: Path, gcs: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = in_place(upload(gcs, archive), tmp_path / "1", monkeypatch)
    readable = [number for number in range(len(tree)) if tree.problem(number) is None]
    expected = [tree.read(number) for number in readable]  # this process has it open when it forks
    if how == "fork":
        loader = DataLoader(
            Contents(tree), sampler=readable, batch_size=5, num_workers=2, collate_fn=whole,
            multiprocessing_context="fork",
        )  # fmt: skip
        assert [content for batch in loader for content in batch] == expected
    with multiprocessing.get_context(how).Pool(2) as pool:
        assert pool.map(functools.partial(read_one, tree), readable, chunksize=5) == expected
    assert len(pickle.dumps(tree)) < 1000


def test_an_archive_that_was_exchanged_is_refused(
    archive: Path, gcs: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = upload(gcs, archive)
    tree = in_place(url, tmp_path / "1", monkeypatch)
    staged(url, tmp_path / "2")
    (tmp_path / "source" / "new").write_bytes(os.urandom(9000))
    gcs.put("data/a.sqsh", pack(tmp_path / "source", archive).read_bytes())
    with pytest.raises(InputError, match=r"gs://bucket/data/a.sqsh: gone, or written again, since"):
        tree.read(len(tree) - 1)
    for place in ("1", "2"):
        with pytest.raises(InputError, match=r"gs://bucket/data/a.sqsh: not the data this chain began with"):
            staged(url, tmp_path / place)
    shutil.rmtree(tmp_path / "2")
    assert len(staged(url, tmp_path / "2")) == len(tree) + 1


def test_what_is_no_archive_is_refused_before_it_is_copied(gcs: Server, tmp_path: Path) -> None:
    url = gcs.put("data/a.sqsh", os.urandom(100_000))
    with pytest.raises(InputError, match=r"gs://bucket/data/a.sqsh: not a squashfs archive"):
        staged(url, tmp_path)
    assert sum(request.bytes for request in gcs.requests if request.kind == "read") < 1000


def test_a_run_that_read_a_copy_goes_on_in_place(
    gcs: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hasty: None
) -> None:
    archive = pack(write_images(tmp_path / "images"), tmp_path / "a.sqsh")
    url, run = upload(gcs, archive), tmp_path / "chain" / "run"
    words = ["--run-dir", str(run), "--dataset-root", url, *SMALL, "workers=2"]
    whole_run = train.main([*words[:1], str(tmp_path / "other" / "run"), *words[2:], "--epochs", "2"])
    shutil.copytree(tmp_path / "other" / "run", run)
    (run / "checkpoints" / "checkpoint_0001.pth").unlink()
    monkeypatch.setenv("RELAY_CACHE_GIB", TINY)
    gcs.requests.clear()
    assert train.main([*words, "--epochs", "2"])["metrics"] == whole_run["metrics"]
    assert records(run) == records(tmp_path / "other" / "run")
    assert not list((tmp_path / "chain" / "staged").glob("*.sqsh")) and gcs.count("read")
