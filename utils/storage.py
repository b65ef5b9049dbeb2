"""Objects by URL, such as gs://bucket/name: asked about, listed and read; `storage_write` writes them. Torch-free.

Only `storage*` know fsspec, which is imported when the first URL is used. All of it works in forked, in spawned and in
threaded processes: what is passed on are URLs and `Info`.

What does not arrive whole, or not in time, is asked for again; see `storage_open` for the errors, which name the URL.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar
from urllib.parse import unquote, urlsplit

from utils import files
from utils import storage_google as google
from utils.errors import InputError
from utils.storage_open import Cut, call, scheme

S = TypeVar("S")
T = TypeVar("T")
PIECE = 8 << 20  # bytes of one request of a download or an upload
WAYS = 16  # requests at a time


class Info(NamedTuple):
    """An object as it was when it was asked about."""

    url: str
    size: int
    stamp: int  # of the content: GCS's generation, elsewhere a hash of what is known of it
    crc32c: int | None  # None where the storage does not tell

    def changed(self, now: Info) -> bool:
        """Whether the content is another one: written again as it was, it has another stamp."""
        if self.crc32c is None or now.crc32c is None:
            return (self.size, self.stamp) != (now.size, now.stamp)
        return (self.size, self.crc32c) != (now.size, now.crc32c)


class Part(NamedTuple):
    """Bytes `start` to `end` of an object."""

    info: Info
    start: int
    end: int


def is_url(path: str | Path) -> bool:
    """Whether a path of a configuration is that of an object and not of a file."""
    return local(path) is None


def local(path: str | Path) -> Path | None:
    """The file that a path or a file:// URL names; None for another URL."""
    text = str(path)
    if "://" not in text:
        return Path(text)
    return Path(unquote(urlsplit(text).path)) if scheme(text) == "file" else None


def join(url: str, name: str) -> str:
    """The URL of `name` below a prefix."""
    return f"{url.rstrip('/')}/{name}"


def look(url: str) -> Info | None:
    """An object; None for a prefix with objects below. Raises: InputError if there is neither."""
    found = call(url, lambda system, path: system.info(path.rstrip("/")))
    return None if found["type"] == "directory" or url.endswith("/") else _info(url, found)


def info(url: str) -> Info:
    """An object. Raises: InputError if there is none."""
    is_google = scheme(url) in google.SCHEMES
    found = _info(url, call(url, partial(google.about, url))) if is_google else look(url)
    if found is None:
        raise InputError(f"{url}: a folder; give the URL of one object")
    return found


def listing(url: str, beginning: str = "") -> list[Info]:
    """Every object below a prefix whose name there begins so, by name. Raises: InputError if there is no bucket."""
    prefix = join(url, beginning)
    if scheme(url) in google.SCHEMES:
        start = f"{scheme(url)}://{google.split(url)[0]}"
        found = [_info(join(start, item["name"]), item) for item in _items(prefix)]
    else:
        objects = call(join(url, ""), lambda system, path: system.find(path, detail=True))
        found = [_info(f"{scheme(url)}://{name.lstrip('/')}", item) for name, item in objects.items()]
        found = [one for one in found if one.url.startswith(prefix)]
    return sorted(one for one in found if not one.url.endswith("/"))  # such an object stands for an empty folder


def _items(prefix: str) -> Iterator[dict[str, Any]]:
    """All below, by pages. Not by gcsfs's own listing, which makes 3 KB of Python of each object."""
    token: str | None = None
    while True:
        page = call(prefix, partial(google.page, prefix, token))
        yield from page.get("items", ())
        if not (token := page.get("nextPageToken")):
            return


def _info(url: str, found: dict[str, Any]) -> Info:
    if "generation" not in found:
        text = repr(sorted((key, str(value)) for key, value in found.items()))
        return Info(url, int(found["size"]), int(hashlib.sha256(text.encode()).hexdigest()[:15], 16), None)
    checksum = int.from_bytes(base64.b64decode(found["crc32c"]), "big") if "crc32c" in found else None
    return Info(url, int(found["size"]), int(found["generation"]), checksum)


def read(of: Info, start: int = 0, end: int | None = None) -> bytes:
    """Bytes `start` to `end` of an object, see `read_many`."""
    return _read(Part(of, start, of.size if end is None else end))


def read_many(parts: Sequence[Part]) -> list[bytes]:
    """The bytes of each part, asked for at once.

    A whole object is compared with its checksum; a part is of the content that was asked about, or not given.

    Raises: InputError if an object is gone or another one by now.
    """
    return at_once(_read, parts)


def at_once(do: Callable[[S], T], things: Sequence[S]) -> list[T]:
    """What `do` returns for each thing, `WAYS` of them at a time."""
    if len(things) < 2:
        return [do(thing) for thing in things]
    with ThreadPoolExecutor(min(WAYS, len(things))) as pool:  # it is gone when the caller forks
        return list(pool.map(do, things))


def _read(part: Part) -> bytes:
    of, is_whole = part.info, part.start == 0 and part.end == part.info.size
    # No checksum tells that a part is of another content; GCS refuses one of a generation that is gone.
    pinned = {"generation": str(of.stamp)} if scheme(of.url) in google.SCHEMES and not is_whole else {}

    def get(system: Any, path: str) -> bytes:
        limits = (None, None) if is_whole else (part.start, part.end)
        try:
            content = system.cat_file(path, *limits, **pinned)
        except FileNotFoundError:
            raise InputError(f"{of.url}: gone, or written again, since it was listed; start again") from None
        if len(content) == part.end - part.start and not (is_whole and differs(of, content)):
            return content
        if of.changed(info(of.url)):
            raise InputError(f"{of.url}: changed since it was listed; put it back, or begin a new run")
        raise Cut(f"cut short or damaged: {len(content)} bytes of {part.end - part.start}")

    return call(of.url, get)


def differs(of: Info, content: bytes) -> bool:
    """Whether a whole content has another checksum, as far as that is known."""
    return of.crc32c is not None and google.crc32c([content]) != of.crc32c


def download(
    of: Info,
    path: Path,
    before_rename: Callable[[str], object] | None = None,
    progress: Callable[[int], object] = lambda done: None,
) -> str:
    """Write an object to the file `path`, by several requests at a time. Returns the sha256 of the content.

    As `files.write_atomic` does: whole, or not at all; `before_rename` is told the sha256, `progress` bytes.
    """

    def write(file: BinaryIO) -> None:
        found = 0
        for content in _pieces(of):
            file.write(content)
            found = google.crc32c([content], found) if of.crc32c is not None else 0
            progress(len(content))
        if of.crc32c not in (None, found):
            raise Cut(f"damaged: its checksum is {found:08x} instead of {of.crc32c:08x}")

    return call(of.url, lambda *_: files.write_atomic(path, write, before_rename))


def _pieces(of: Info) -> Iterator[bytes]:
    """The content in order. While one lot of pieces is written, the next is on its way."""
    parts = [Part(of, start, min(start + PIECE, of.size)) for start in range(0, of.size, PIECE)]
    lots = [parts[place : place + WAYS // 2] for place in range(0, len(parts), WAYS // 2)]
    with ThreadPoolExecutor(1) as ahead:
        coming = ahead.submit(read_many, lots[0]) if lots else None
        for following in [*lots[1:], None]:
            if coming:
                got = coming.result()
                coming = ahead.submit(read_many, following) if following else None
                yield from got
