"""A run directory kept in a bucket, so that another machine goes on from it. Torch-free.

Objects are written first, then the manifest that names them, see `manifest`. An attempt on a machine that was given
up, and comes back, finds its number taken.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from utils import checkpoint_files, files, log, manifest, paths, storage, storage_write
from utils.errors import EnvironmentProblem, InputError, RelayError
from utils.manifest import Entry
from utils.paths import RunDir


class Mirror:
    """The run directory `folder` and its copy at `url`, between `pull` and the last `push`."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url, self.folder = url, folder
        self.note, self.lock = folder / ".mirror.json", folder / ".mirror.lock"
        self.known: dict[Path, tuple[int, int, str]] = {}  # size, mtime and sha256 of files

    def pull(self) -> None:
        """Bring the directory to what the bucket has, unless it is that, or further, already.

        Checkpoints that the manifest does not name are set aside: they are another history's. By several processes of
        a machine at once the work is done once.

        Raises: EnvironmentProblem; CheckpointError for an object that is not what its manifest says.
        """
        paths.make_private(self.folder)
        with files.lock(self.lock):
            there = manifest.newest(self.url)
            if there.number <= self.number():
                return
            log.info(f"{self.url}: bringing {len(there.files)} files to {self.folder}")
            for name, entry in there.files.items():
                manifest.fetch(self.url, entry, self.folder / name)
            self._set_aside(there.files)
            move_marker(self.folder, there.root)
            self._write_note(there.number)

    def push(self) -> None:
        """Write what is new in the directory, then the manifest, then delete what neither it nor the one before names.

        Raises: EnvironmentProblem when another attempt has written meanwhile; or the storage does not do its part.
        """
        with files.lock(self.lock):
            self._push()

    def _push(self) -> None:
        objects = storage.listing(self.url)
        found = manifest.found_in(self.url, objects)
        before = manifest.read(found) if found else manifest.NOTHING
        if before.number != self.number():
            raise manifest.taken_over(self.url)
        names = {entry.sha256: entry.object for entry in before.files.values()}
        entries: dict[str, Entry] = {}
        for path in self._files():
            is_fixed = path.suffix == ".pth"  # others, such as logs, may grow while they are read
            content = path if is_fixed else path.read_bytes()
            digest = self._sha256(path) if isinstance(content, Path) else hashlib.sha256(content).hexdigest()
            name = path.relative_to(self.folder).as_posix()
            if digest not in names:
                names[digest] = manifest.object_name(name, digest)
                storage_write.write(storage.join(self.url, names[digest]), content)
            size = path.stat().st_size if isinstance(content, Path) else len(content)
            entries[name] = Entry(names[digest], digest, size)
        if entries == before.files:
            return
        now = manifest.Manifest(before.number + 1, str(self.folder), entries, before.aside)
        manifest.write(self.url, now)
        self._write_note(now.number)
        try:
            storage_write.delete(manifest.left_over(self.url, objects, (before, now)))
        except (EnvironmentProblem, InputError) as error:  # all is written; some buckets do not let delete
            log.warning(f"{self.url}: what is not needed any more stays: {error}")

    def _set_aside(self, named: manifest.Files) -> None:
        """Move away the checkpoints that the manifest does not name, as `resume.make_room` does."""
        directory = RunDir(self.folder).checkpoints
        found = checkpoint_files.everything(directory)
        if stray := [path for path in found if f"{directory.name}/{path.name}" not in named]:
            aside = paths.free_name(directory)
            aside.mkdir()
            for path in stray:
                path.rename(aside / path.name)

    def _files(self) -> Iterator[Path]:
        for path in sorted(self.folder.rglob("*")):
            hidden = any(part.startswith(".") for part in path.relative_to(self.folder).parts)
            if path.is_file() and not hidden:
                yield path

    def _sha256(self, path: Path) -> str:
        status = path.stat()
        size, mtime, digest = self.known.get(path, (0, 0, ""))
        if (size, mtime) != (status.st_size, status.st_mtime_ns):
            digest = checkpoint_files.known(path) or files.sha256(path)
            self.known[path] = status.st_size, status.st_mtime_ns, digest
        return digest

    def number(self) -> int:
        """Of the manifest that the directory is, or goes on from; 0 without one."""
        try:
            note = json.loads(self.note.read_text())
        except FileNotFoundError:
            return 0
        return int(note["number"]) if note["url"] == self.url else 0

    def _write_note(self, number: int) -> None:
        files.write_json(self.note, {"url": self.url, "number": number})


def move_marker(folder: Path, root: str) -> None:
    """Paths in the marker as they are on this machine: those in the chain's directory lie in this one's now."""
    file = RunDir(folder).state
    if file.exists() and root != str(folder):
        there, here = str(Path(root).parent), str(folder.parent)
        files.write_json(file, _replaced(json.loads(file.read_text()), there, here))


def _replaced(value: Any, there: str, here: str) -> Any:
    if isinstance(value, dict):
        return {key: _replaced(item, there, here) for key, item in value.items()}
    if isinstance(value, list):
        return [_replaced(item, there, here) for item in value]
    if isinstance(value, str) and value.startswith(f"{there}/"):
        return here + value[len(there) :]
    return value


_mirrors: dict[Path, Mirror] = {}


@contextlib.contextmanager
def kept(run_dir: RunDir, rank: int) -> Iterator[None]:
    """Bring a run directory that has a URL here, and keep it there: rank 0 writes at each `push` and at the end."""
    if run_dir.url is None:
        yield
        return
    mirror = Mirror(run_dir.url, run_dir.path)
    mirror.pull()
    if rank:
        yield
        return
    _mirrors[run_dir.path] = mirror
    try:
        yield
    except BaseException:
        with contextlib.suppress(RelayError, OSError):  # the cause to tell is what ended the run
            mirror.push()
        raise
    finally:
        del _mirrors[run_dir.path]
    mirror.push()


def push(run_dir: RunDir) -> None:
    """Write what is new in a run directory to where `kept` keeps it, if it does. Raises: EnvironmentProblem."""
    if mirror := _mirrors.get(run_dir.path):
        mirror.push()
