"""What a bucket's copy of a run directory holds: one JSON object that names all others. Torch-free.

    <url>/manifest_00000012.json                             name -> object, sha256, size
    <url>/objects/checkpoints/checkpoint_0003.1f3a5c7e.pth   one object a file, the beginning of its sha256 in its name

Only what the newest manifest names is loaded. Only one can write the next number: that is the claim on the run.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

from utils import files, storage, storage_write
from utils.errors import CheckpointError, EnvironmentProblem, InputError
from utils.storage import Info

BEGINNING = "manifest_"
TAKEN_OVER = "this run was taken over by another attempt"
NUMBERED = re.compile(rf"{BEGINNING}(\d{{8}})\.json")
OBJECTS = "objects"  # nothing else of what lies below the URL is ever deleted: it may be somebody else's
HASH = 8  # characters of a sha256 in an object's name


@dataclass(frozen=True)
class Entry:
    """One file of the directory."""

    object: str  # below the manifest's place
    sha256: str
    size: int


Files = Mapping[str, Entry]  # by name, below the run directory


@dataclass(frozen=True)
class Manifest:
    number: int
    root: str  # the directory it is of: paths in its marker begin so
    files: Files
    aside: Sequence[Files] = ()  # what the directory held before its stage was begun again

    def objects(self) -> set[str]:
        """All that it names."""
        return {entry.object for held in (self.files, *self.aside) for entry in held.values()}


NOTHING = Manifest(0, "", {})


def found_in(url: str, objects: Sequence[Info]) -> Info | None:
    """The newest manifest of the run directory `url` among all objects below it, or below its chain."""
    ours = [one for one in objects if NUMBERED.fullmatch(one.url.removeprefix(storage.join(url, "")))]
    return max(ours, key=lambda one: one.url, default=None)


def newest(url: str) -> Manifest:
    """What a directory in a bucket holds now. Raises: InputError if it is none of ours; EnvironmentProblem."""
    found = found_in(url, storage.listing(url, BEGINNING))
    return read(found) if found else NOTHING


def object_name(name: str, digest: str) -> str:
    """Of the object that holds the file `name`, whose sha256 is `digest`."""
    path = PurePosixPath(OBJECTS, name)
    return str(path.with_name(f"{path.stem}.{digest[:HASH]}{path.suffix}"))


def left_over(url: str, objects: Sequence[Info], kept: Sequence[Manifest]) -> list[str]:
    """Which of the `objects` below `url` are ours, and of none of the manifests `kept`."""
    names = {one.url: one.url.removeprefix(storage.join(url, "")) for one in objects}
    ours = [one for one, name in names.items() if name.startswith(f"{OBJECTS}/") or NUMBERED.fullmatch(name)]
    named = {storage.join(url, name) for each in kept for name in each.objects()}
    return [one for one in ours if one not in named and one not in {url_of(url, each.number) for each in kept}]


def read(of: Info) -> Manifest:
    """Raises: InputError if it is damaged, or not there any more."""
    number = NUMBERED.search(of.url)
    assert number
    content = storage.read(of)
    try:
        found = json.loads(content)
        files, *aside = [_files(held) for held in (found["files"], *found["aside"])]
        return Manifest(int(number[1]), str(found["root"]), files, aside)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{of.url}: damaged; delete it, and the one before it counts") from None


def _files(held: dict[str, dict]) -> Files:
    entries = {name: Entry(**entry) for name, entry in held.items()}
    if unsafe := [name for name in entries if name.startswith("/") or ".." in name.split("/")]:
        raise ValueError(unsafe[0])
    return entries


def taken_over(url: str) -> EnvironmentProblem:
    """What the attempt is told that another one has replaced."""
    return EnvironmentProblem(f"{url}: {TAKEN_OVER}; this one stops and writes no more")


def write(url: str, manifest: Manifest) -> None:
    """Claim the number. Raises: EnvironmentProblem when another attempt has it."""
    held = {name: value for name, value in asdict(manifest).items() if name != "number"}
    content = json.dumps({**held, "written": secrets.token_hex(8)}, indent=1).encode()  # never what another one writes
    try:
        storage_write.write(url_of(url, manifest.number), content, new=True)
    except FileExistsError:
        raise taken_over(url) from None


def url_of(url: str, number: int) -> str:
    """Where the manifest with this number is."""
    return storage.join(url, f"{BEGINNING}{number:08d}.json")


def fetch(url: str, entry: Entry, path: Path) -> None:
    """Write a file that a manifest at `url` names, unless it is there. Raises: CheckpointError for another content."""
    if path.is_file() and path.stat().st_size == entry.size and files.sha256(path) == entry.sha256:
        return
    place = storage.join(url, entry.object)

    def compare(digest: str) -> None:
        if digest != entry.sha256:
            raise CheckpointError(f"{place}: damaged: its sha256 is not the one in the manifest")

    storage.download(storage.info(place), path, compare)
