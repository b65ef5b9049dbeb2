"""Objects in a bucket: read, listed, written, deleted, over a connection that breaks in every way."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.gcs_server import BUCKET, Fault, Server, gcs, hasty
from utils import storage, storage_google, storage_open, storage_write
from utils.errors import EnvironmentProblem, InputError
from utils.files import sha256
from utils.paths import ROOT
from utils.storage import Part

__all__ = ["gcs", "hasty"]  # fixtures
NAMES = ["plain.png", "a b/c#1?x=%41.png", "d\u00e9ep/[x]*{y}.png", "a/x", "a/y/z", "ab"]


def test_what_is_a_url_and_what_a_file() -> None:
    assert storage.local("data/x.sqsh") == Path("data/x.sqsh") == storage.local(Path("data/x.sqsh"))
    assert storage.local("file:///data/a%20b") == Path("/data/a b")
    assert storage.is_url("gs://bucket/x") and not storage.is_url("file:///x") and not storage.is_url("C:/x")


@pytest.mark.parametrize("root", ["gs://bucket/root", "memory://root"])
def test_objects_come_back_as_they_were_written(root: str, gcs: Server, tmp_path: Path) -> None:
    content = {name: os.urandom(100 + number) for number, name in enumerate(NAMES)}
    for name, data in content.items():
        (tmp_path / "file").write_bytes(data)
        written = storage_write.write(storage.join(root, name), data if "a" in name else tmp_path / "file")
        assert written == storage.info(storage.join(root, name)) == storage.look(storage.join(root, name))
        assert storage.read(written) == data and storage.read(written, 3, 90) == data[3:90]
    listed = storage.listing(root)
    assert [one.url for one in listed] == sorted(storage.join(root, name) for name in NAMES)
    assert storage.read_many([Part(one, 0, one.size) for one in listed]) == [
        content[one.url.removeprefix(f"{root}/")] for one in listed
    ]
    assert [one.url for one in storage.listing(f"{root}/a/")] == [f"{root}/a/x", f"{root}/a/y/z"]
    assert storage.look(f"{root}/a") is None and storage.look(f"{root}/a/") is None
    with pytest.raises(InputError, match=f"{root}/a: (a folder|not found)"):
        storage.info(f"{root}/a")
    storage_write.delete([*(one.url for one in listed), f"{root}/never was"])
    assert storage.listing(root) == []


def test_a_listing_of_many_pages_is_whole(gcs: Server) -> None:
    names = [f"set/{number}" for number in range(7)]
    for name in [*names, "set/", "sets", "other/x"]:
        gcs.put(name, b"x")
    gcs.page = 3
    assert [one.url for one in storage.listing("gs://bucket/set")] == [f"gs://bucket/{name}" for name in names]
    assert len(gcs.requests) == 3


def test_a_large_object_comes_by_parts_and_appears_whole(
    gcs: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "PIECE", 1000)
    content = os.urandom(23_456)
    url = gcs.put("large", content)
    digests: list[str] = []
    digest = storage.download(storage.info(url), tmp_path / "copy", digests.append)
    assert (tmp_path / "copy").read_bytes() == content and [digest] == digests == [sha256(tmp_path / "copy")]
    assert gcs.count("read")["large"] == 24
    storage.download(storage.info(gcs.put("empty", b"")), tmp_path / "empty")
    assert (tmp_path / "empty").read_bytes() == b""


def one_read(of: storage.Info, expected: bytes) -> None:
    assert storage.read(of) == expected


@pytest.mark.parametrize("how", ["fork", "spawn"])
def test_other_processes_read_what_this_one_has_open(how: Any, gcs: Server) -> None:
    of = storage.info(gcs.put("x", b"content"))
    one_read(of, b"content")
    children = [multiprocessing.get_context(how).Process(target=one_read, args=(of, b"content")) for _ in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0]
    one_read(of, b"content")  # and they leave its connections alone


@pytest.mark.parametrize(
    "fault",
    [
        Fault(status=503, share=0.2, kind="read info list write delete"),
        Fault(status=429, first=1),
        Fault(status=502, first=2, kind="info list write"),
        Fault(cut="body", first=1),
        Fault(cut="length", first=1),
        Fault(cut="body", first=1, kind="info list write"),
        Fault(seconds=1, first=1),
    ],
    ids=lambda fault: f"{fault.kind}-{fault.status or fault.cut or 'slow'}",
)
def test_what_goes_wrong_for_a_while_is_not_noticed(
    fault: Fault, gcs: Server, hasty: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(storage_google, "SILENT", 0.3)
    monkeypatch.setattr(storage, "PIECE", 64)
    gcs.faults = [fault]
    content = {f"gs://bucket/x{number}": os.urandom(300) for number in range(8)}
    for url, data in content.items():
        storage_write.write(url, data, new=True)
    listed = storage.listing("gs://bucket")
    assert storage.read_many([Part(one, 0, one.size) for one in listed]) == list(content.values())
    storage.download(listed[3], tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == content[listed[3].url]
    storage_write.delete(content)
    assert storage.listing("gs://bucket") == [] and fault.hits


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (Fault(status=503), "the storage fails (HTTP 503), also after several tries; try again later"),
        (Fault(status=401), "no access with these credentials (HTTP 401); run `gcloud auth application-default login`"),
        (Fault(status=403), "no access with these credentials (HTTP 403); run `gcloud auth application-default login`"),
        (Fault(cut="body"), "the answer is cut short, also after several tries"),
        (Fault(cut="length"), "cut short or damaged: 50 bytes of 100, also after 4 tries"),
        (Fault(seconds=9), "the storage does not answer in time"),
    ],
    ids=lambda value: str(value.status or value.cut or "slow") if isinstance(value, Fault) else "",
)
def test_what_stays_wrong_is_one_line(
    fault: Fault, reason: str, gcs: Server, hasty: None, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.setattr(storage_google, "WHOLE", 0.3)
    gcs.faults = [fault]
    of = storage.info(gcs.put("x", b"y" * 100))
    with pytest.raises(EnvironmentProblem) as caught:
        storage.read(of)
    assert str(caught.value).startswith(f"gs://bucket/x: {reason}") and "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_nothing_answers(monkeypatch: pytest.MonkeyPatch, hasty: None) -> None:
    with Server() as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.host)
    monkeypatch.setattr(storage_open, "_opened", {})
    with pytest.raises(EnvironmentProblem, match=r"gs://bucket/x: no connection to the storage .*check the network"):
        storage.info("gs://bucket/x")


@pytest.mark.parametrize("do", [storage.info, storage.look, storage.listing, partial(storage_write.write, content=b"")])
def test_what_is_not_there_is_bad_input(do: Callable[[str], Any], gcs: Server) -> None:
    with pytest.raises(InputError, match=r"gs://none/x.*: not found; check the bucket and the name"):
        do("gs://none/x")


def test_another_content_than_was_listed_is_refused(gcs: Server) -> None:
    was = storage.info(gcs.put("x", b"1" * 100))
    gcs.put("x", b"1" * 100)
    assert storage.read(was) == b"1" * 100  # the same, written again
    for content in (b"2" * 100, b"1" * 99):
        gcs.put("x", content)
        with pytest.raises(InputError, match="gs://bucket/x: changed since it was listed"):
            storage.read(was)
    with pytest.raises(InputError, match="gs://bucket/x: gone, or written again"):
        storage.read(was, 0, 10)
    storage_write.delete([was.url])
    with pytest.raises(InputError, match="gs://bucket/x: gone"):
        storage.read(was)


def create(url: str, content: bytes) -> bool:
    try:
        storage_write.write(url, content, new=True)
    except FileExistsError:
        return False
    return True


@pytest.mark.parametrize("size", [10, 10 << 20])  # at once, and by parts
def test_one_of_many_creates_an_object(size: int, gcs: Server) -> None:
    with ThreadPoolExecutor(4) as pool:
        contents = [bytes([number]) * size for number in range(4)]
        won = list(pool.map(partial(create, "gs://bucket/x"), contents))
    assert sum(won) == 1 and storage.read(storage.info("gs://bucket/x")) == contents[won.index(True)]


def test_an_object_whose_answer_was_lost_is_not_taken_for_somebody_elses(gcs: Server, hasty: None) -> None:
    gcs.faults = [Fault(kind="write", cut="body", first=1)]
    assert create("gs://bucket/x", b"mine")
    assert gcs.count("write", bad=True)["x"] == 2 and not create("gs://bucket/x", b"yours")


def test_what_was_kept_otherwise_than_sent_is_noticed(gcs: Server, hasty: None) -> None:
    gcs.faults = [Fault(kind="info", body='{"size": 4, "generation": 1, "crc32c": "AAAAAA=="}', status=200)]
    with pytest.raises(EnvironmentProblem, match="gs://bucket/x: not kept as it was sent"):
        storage_write.write("gs://bucket/x", b"mine")


def test_without_gcsfs_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_open, "_opened", {})
    monkeypatch.setitem(sys.modules, "gcsfs.core", None)
    with pytest.raises(EnvironmentProblem, match=r"pip install -e \.\[gcs\]"):
        storage.info("gs://bucket/x")
    with pytest.raises(InputError, match="ftpx://: no such kind of storage"):
        storage.info("ftpx://bucket/x")


def test_nothing_is_imported_before_it_is_needed() -> None:
    code = "import sys, utils.storage_write; print({'torch', 'fsspec', 'gcsfs', 'aiohttp'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "set()\n"


def test_the_command_line_serves_other_programs() -> None:
    command = [sys.executable, "-m", "tests.gcs_server", "--bucket", BUCKET]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout
        name, _, value = server.stdout.readline().removeprefix("export ").strip().partition("=")
        code = "from utils import storage_write; print(storage_write.write('gs://bucket/x', b'123').size)"
        told = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=os.environ | {name: value}, capture_output=True
        )
        server.terminate()
    assert told.stdout == b"3\n", told.stderr
