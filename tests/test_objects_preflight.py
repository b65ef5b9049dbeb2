"""What is wrong with the URLs of a chain is said before anything is queued, and without fetching them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.archives import NEEDS_TOOLS, pack
from tests.gcs_server import Fault, Server, gcs
from tests.test_stages import foreseen

__all__ = ["gcs"]  # a fixture


@NEEDS_TOOLS
def test_an_archive_is_looked_at_and_not_fetched(gcs: Server, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "file").write_bytes(bytes(range(256)) * 400)
    url = gcs.put("a.sqsh", pack(tmp_path / "set", tmp_path / "a.sqsh", "-noD").read_bytes())
    assert foreseen("pretrain", f"data.unlabeled={url}") == []
    assert sum(request.bytes for request in gcs.requests if request.kind == "read") < 1000
    gcs.put("a.sqsh", b"no archive" * 100)
    assert foreseen("pretrain", f"data.unlabeled={url}") == [
        "data.unlabeled: gs://bucket/a.sqsh: not a squashfs archive; give one made by mksquashfs or a folder"
    ]
    missing = "data.unlabeled: gs://bucket/b.sqsh: not found; check the bucket and the name"
    assert foreseen("pretrain", "data.unlabeled=gs://bucket/b.sqsh") == [missing]


@pytest.mark.parametrize("above", ["", "labeled/"])
def test_a_prefix_has_the_split(above: str, gcs: Server) -> None:
    gcs.put(f"set/{above}training/images/1.png", b"x")
    assert foreseen("r1", "data.labeled=gs://bucket/set") == []
    assert foreseen("pretrain", "data.unlabeled=gs://bucket/set/") == []
    assert foreseen("eval", "data.labeled=gs://bucket/set", "data.split=validation") == [
        "data.labeled: gs://bucket/set: no validation/images or labeled/validation/images in it"
    ]


@pytest.mark.parametrize("key", ["data.classes", "backbone", "init", "best", "resume"])
def test_every_object_that_is_named_must_be_there(key: str, gcs: Server) -> None:
    gcs.put("set/training/images/1.png", b"x")
    words = ["data.labeled=gs://bucket/set", "init=r1.last", f"{key}=gs://bucket/a.pth"]
    assert foreseen("r2", *words) == [f"{key}: gs://bucket/a.pth: not found; check the bucket and the name"]
    gcs.put("a.pth", b"x")
    assert foreseen("r2", *words) == [] and not gcs.count("read")


def test_what_cannot_be_asked_is_said(gcs: Server) -> None:
    gcs.faults = [Fault("info list", status=403)]
    (said,) = foreseen("pretrain", "data.unlabeled=gs://bucket/set")
    assert said.startswith("data.unlabeled: gs://bucket/set: no access with these credentials (HTTP 403)")
