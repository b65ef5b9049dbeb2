"""Credentials by the usual means: found, renewed, lost; and never to be read anywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fsspec.config  # type: ignore[import-untyped]
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from tests.gcs_server import Fault, Server, gcs, hasty
from utils import storage, storage_open, storage_write
from utils.errors import EnvironmentProblem

__all__ = ["gcs", "hasty"]  # fixtures
SECRET = "ya29.canary-token"


@pytest.fixture
def account(gcs: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A service account's key file, whose tokens the server of the test gives out. Returns what must stay secret."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    text = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()
    account = {
        "type": "service_account", "project_id": "p", "private_key_id": "1", "private_key": text,
        "client_email": "robot@p.iam.gserviceaccount.com", "token_uri": f"{gcs.host}/token",
    }  # fmt: skip
    (tmp_path / "key.json").write_text(json.dumps(account))
    monkeypatch.delenv("STORAGE_EMULATOR_HOST")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "key.json"))
    monkeypatch.setitem(fsspec.config.conf, "gs", {"endpoint_url": gcs.host})
    return text.splitlines()[5]


def grant(kind: str = "write") -> Fault:
    return Fault(kind, "/token", status=200, body=json.dumps({"access_token": SECRET, "expires_in": 3600}))


def test_a_key_file_is_used(gcs: Server, account: str) -> None:
    gcs.faults = [grant()]
    assert storage.read(storage_write.write("gs://bucket/x", b"123")) == b"123"
    assert gcs.authorized and set(gcs.authorized) == {f"Bearer {SECRET}"}


def test_a_token_that_cannot_be_had_for_a_while_is_waited_for(gcs: Server, account: str, hasty: None) -> None:
    gcs.put("x", b"123")
    gcs.faults = [grant(), Fault("write", "/token", status=500, first=4)]
    assert storage.read(storage.info("gs://bucket/x")) == b"123"


@pytest.mark.parametrize(
    "faults",
    [
        [grant(), Fault("info", status=401, body=json.dumps({"error": {"message": f"Invalid Credentials {SECRET}"}}))],
        [grant(), Fault("info list", status=403, body=json.dumps({"error": {"message": f"no {SECRET}"}}))],
        [grant(), Fault("info", status=400, body=json.dumps({"error": {"message": f"invalid {SECRET}"}}))],
        [grant(), Fault("info", status=503, body=SECRET)],
        [Fault("write", "/token", status=400, body=json.dumps({"error": f"invalid_grant {SECRET}"}))],
        [Fault("write", "/token", status=500, body=SECRET)],
    ],
    ids=["401", "403", "400", "503", "no grant", "no answer"],
)
def test_nobody_reads_a_secret(
    faults: list[Fault], gcs: Server, account: str, hasty: None, capfd: Any, caplog: pytest.LogCaptureFixture
) -> None:
    gcs.put("x", b"123")
    gcs.faults = faults
    with pytest.raises(Exception) as caught:
        storage.info("gs://bucket/x")
    said = capfd.readouterr()
    everything = f"{caught.getrepr(chain=True, showlocals=False)} {said.out} {said.err} {caplog.text}"
    assert SECRET not in everything and account not in everything and "PRIVATE" not in everything
    assert str(caught.value).startswith("gs://bucket/x: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [None, "{}", '{"type": "service_account"}'])
def test_without_credentials_the_error_names_the_usual_means(
    content: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    monkeypatch.setattr(storage_open, "_opened", {})
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "key.json"))
    if content:
        (tmp_path / "key.json").write_text(content)
    with pytest.raises(EnvironmentProblem, match=r"no usable Google credentials .*gcloud auth application-default"):
        storage.info("gs://bucket/x")
