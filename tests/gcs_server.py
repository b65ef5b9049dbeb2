"""A Google Cloud Storage on loopback: the emulator, and before it a proxy that counts, and breaks what it is told to.

    python -m tests.gcs_server --bucket images

prints the line by which a shell's programs use it, and serves until Ctrl-C.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import hashlib
import http.client
import json
import logging
import re
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any, NamedTuple
from urllib.parse import parse_qs, quote, unquote, urlsplit

import pytest
from gcp_storage_emulator.server import create_server  # type: ignore[import-untyped]

from utils import storage_open

BUCKET = "bucket"
OBJECT = re.compile(r"(?:/upload|/download)?/storage/v1/b/([^/]+)(?:/o(?:/(.+))?)?")


class Request(NamedTuple):
    """One that came in, as it was answered."""

    kind: str  # read, info, list, write, delete
    name: str  # of the object, in its bucket
    span: str  # the Range header
    status: int
    bytes: int  # of the answer's body


@dataclass
class Fault:
    """What is done with the requests whose kind and name match."""

    kind: str = "read"  # of a Request, or several of them
    name: str = ".*"
    share: float = 1.0  # of the requests; which ones, is the same each time
    first: int | None = None  # only so many, of each object
    status: int | None = None  # answered instead
    body: str = "{}"
    seconds: float = 0.0  # before the answer
    cut: str = ""  # "body": half of it, then the end of the connection; "length": half of it, as if that were all
    hits: Counter[str] = field(default_factory=Counter)

    def strikes(self, kind: str, name: str, number: int) -> bool:
        """Whether it does so to the request that is the `number`-th of its kind for this object."""
        if kind not in self.kind.split() or not re.fullmatch(self.name, name):
            return False
        drawn = int(hashlib.sha256(f"{kind} {name} {number}".encode()).hexdigest()[:8], 16) / 16**8
        if drawn >= self.share or (self.first is not None and self.hits[name] >= self.first):
            return False
        self.hits[name] += 1
        return True


class Server:
    """A context manager. `requests` is what came in since it was cleared, `faults` what is done to them."""

    def __init__(self, bucket: str = BUCKET) -> None:
        self.lock, self.writing, self.over = threading.Lock(), threading.Lock(), threading.Event()
        self.idle, self.busy = threading.Condition(self.lock), 0
        self._alone = threading.Lock()
        self._emulator = create_server("127.0.0.1", 0, in_memory=True, default_bucket=bucket)
        self._emulator._api.daemon = True
        self.reset()

    def reset(self) -> None:
        """Empty, without faults, nothing asked."""
        self.over.set()  # whoever asked may have gone, and what it asked for would be done in the next test
        with self.idle:
            self.idle.wait_for(lambda: not self.busy)
        self.over.clear()
        self._emulator.wipe(keep_buckets=True)
        self.requests: list[Request] = []
        self.authorized: list[str] = []  # the Authorization headers
        self.faults: list[Fault] = []
        self.page = 1000  # objects in one answer to a listing
        self._seen = Counter[tuple[str, str]]()

    def __enter__(self) -> Server:
        logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)
        logging.getLogger("api.object").setLevel(logging.CRITICAL)
        self._emulator.start()
        self._behind = self._emulator._api._httpd.server_port
        self._proxy = Front(("127.0.0.1", 0), type("Bound", (Proxy,), {"owner": self}))
        self.host = f"http://127.0.0.1:{self._proxy.server_port}"
        threading.Thread(target=self._proxy.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.over.set()
        self._proxy.shutdown()
        self._proxy.server_close()
        self._emulator.stop()

    def put(self, name: str, content: bytes, bucket: str = BUCKET) -> str:
        """An object, past the proxy. Returns its URL."""
        status, _, said = self.upload(bucket, name, content)
        assert status == 200, said
        return f"gs://{bucket}/{name}"

    def upload(self, bucket: str, name: str, content: bytes) -> tuple[int, dict[str, str], bytes]:
        """Not as one body of several parts, at least not with content: the emulator takes such a body for text."""
        path = f"/upload/storage/v1/b/{bucket}/o?uploadType=media&name={quote(name, safe='')}"
        headers = {"Content-Type": "application/octet-stream"}
        if not content:
            path, headers = path.replace("media", "multipart"), {"Content-Type": 'multipart/related; boundary="="'}
            content = b"--=\nContent-Type: application/json\n\n{}\n--=\nContent-Type: x/x\n\n\n--=--"
        return self.forward("POST", path, headers, content)

    def count(self, kind: str, *, bad: bool = False) -> Counter[str]:
        """Requests of this kind by object; only those that were answered well, unless `bad`."""
        with self.lock:
            return Counter(one.name for one in self.requests if one.kind == kind and (bad or one.status < 300))

    def struck(self, kind: str, name: str) -> list[Fault]:
        with self.lock:
            self._seen[kind, name] += 1
            return [fault for fault in self.faults if fault.strikes(kind, name, self._seen[kind, name])]

    def generation(self, bucket: str, name: str) -> str | None:
        status, _, body = self.forward("GET", f"/storage/v1/b/{bucket}/o/{quote(name, safe='')}", {}, b"")
        return json.loads(body)["generation"] if status == 200 else None

    def forward(
        self, method: str, path: str, headers: dict[str, str], body: bytes
    ) -> tuple[int, dict[str, str], bytes]:
        """What the emulator answers: status, headers, body."""
        with self._alone:  # it answers one at a time, and lets no more than five wait
            connection = http.client.HTTPConnection("127.0.0.1", self._behind, timeout=60)
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            result = answer.status, dict(answer.getheaders()), answer.read()
            connection.close()
            return result


class Front(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


class Proxy(BaseHTTPRequestHandler):
    """What the emulator leaves out, and GCS does, is done here: preconditions, generations, pages."""

    owner: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def handle_any(self) -> None:
        with self.owner.lock:
            self.owner.busy += 1
        try:
            self.handle_one()
        finally:
            with self.owner.idle:
                self.owner.busy -= 1
                self.owner.idle.notify_all()

    do_GET = do_POST = do_PUT = do_DELETE = handle_any

    def handle_one(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        match = OBJECT.fullmatch(parts.path)
        bucket, name = (unquote(match[1]), unquote(match[2] or "")) if match else ("", parts.path)
        kind = self.kind(query, name)
        if kind == "write" and match:
            name = query.get("name") or json.loads(body.split(b"\n\n", 1)[1].split(b"\n--", 1)[0])["name"]
        elif kind == "list":
            name = query.get("prefix", "")
        cut, status, headers, content = "", 0, {}, b""
        for fault in self.owner.struck(kind, name):
            self.owner.over.wait(fault.seconds)
            cut = fault.cut or cut
            if fault.status:
                status, headers, content = fault.status, {"Content-Type": "application/json"}, fault.body.encode()
        if not status:
            status, headers, content = self.answer(kind, bucket, name, query, body)
        self.reply(Request(kind, name, self.headers.get("Range", ""), status, len(content)), headers, content, cut)

    def kind(self, query: dict[str, str], name: str) -> str:
        if self.command == "GET":
            return "read" if query.get("alt") == "media" else "info" if name else "list"
        return "delete" if self.command == "DELETE" else "write"

    def answer(self, kind: str, bucket: str, name: str, query: dict[str, str], body: bytes) -> Any:
        owner, headers = self.owner, {key: value for key, value in self.headers.items() if key != "Connection"}
        if kind == "read" and query.get("generation", now := owner.generation(bucket, name)) != now:
            return 404, {}, b"{}"
        if kind == "delete" and "upload_id" in query:
            return 499, {}, b"{}"
        if kind != "write":
            status, said, content = owner.forward(self.command, self.path, headers, body)
            return status, said, self.paged(content, query) if kind == "list" and status == 200 else content
        with owner.writing:
            if query.get("ifGenerationMatch") == "0" and owner.generation(bucket, name):
                return 412, {}, b"{}"
            if query.get("uploadType") == "multipart":
                content = body.split(b"\n\n", 2)[2].rpartition(b"\n--")[0]
                return owner.upload(bucket, name, content)
            return owner.forward(self.command, self.path, headers, body)

    def paged(self, content: bytes, query: dict[str, str]) -> bytes:
        listed = json.loads(content)
        start, most = int(query.get("pageToken", 0)), min(self.owner.page, int(query.get("maxResults", 1000)))
        items = sorted(listed.get("items", []), key=lambda item: item["name"])
        listed["items"] = items[start : start + most]
        if start + most < len(items):
            listed["nextPageToken"] = str(start + most)
        return json.dumps(listed).encode()

    def reply(self, request: Request, headers: dict[str, str], content: bytes, cut: str) -> None:
        with self.owner.lock:
            self.owner.requests.append(request)
            self.owner.authorized += self.headers.get_all("Authorization", [])
        sent = content[: len(content) // 2] if cut else content
        self.send_response_only(request.status)
        for key, value in headers.items():
            if key.lower() not in ("content-length", "connection", "date", "server"):
                self.send_header(key, value)
        self.send_header("Content-Length", str(len(content if cut == "body" else sent)))
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # who asked may not wait for the answer
            self.wfile.write(sent)
        self.close_connection = cut == "body"


@functools.cache
def _shared() -> Server:
    return Server().__enter__()


@pytest.fixture
def gcs(monkeypatch: pytest.MonkeyPatch) -> Server:
    """An empty storage, which this process and its children use."""
    server = _shared()
    server.reset()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.host)
    monkeypatch.setattr(storage_open, "_opened", {})
    return server


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits between two tries, in this process and its forks."""
    monkeypatch.setattr(storage_open, "FIRST_WAIT", 0.001)
    monkeypatch.setattr("gcsfs.retry.asyncio", SimpleNamespace(sleep=lambda seconds: asyncio.sleep(seconds / 1000)))
    monkeypatch.setattr("google.auth._exponential_backoff.time", SimpleNamespace(sleep=lambda seconds: None))


def main() -> None:
    parser = argparse.ArgumentParser("python -m tests.gcs_server", description="A Google Cloud Storage to try with.")
    parser.add_argument("--bucket", default=BUCKET)
    with Server(parser.parse_args().bucket) as server:
        print(f"export STORAGE_EMULATOR_HOST={server.host}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.over.wait()


if __name__ == "__main__":
    main()
