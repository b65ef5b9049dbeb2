"""What others than a run itself want of its copy in a bucket: its marker, one of its files, to begin anew."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

from utils import checkpoint_files, files, manifest, object_cache, paths, storage
from utils.errors import CheckpointError, InputError
from utils.mirror import Mirror, move_marker
from utils.paths import RunDir
from utils.shared_config import FILE_KEYS
from utils.storage import Info

C = TypeVar("C", bound=Any)  # a program's configuration


def pull(url: str, folder: Path) -> None:
    """Bring a whole run directory to `folder`, see `Mirror.pull`."""
    Mirror(url, folder).pull()


def pull_markers(url: str, folder: Path) -> None:
    """Bring to the chain's directory `folder` how far each stage of the chain in `url` is.

    Raises: EnvironmentProblem if the bucket does not answer.
    """
    objects = storage.listing(url)
    stages = {one.url.removeprefix(storage.join(url, "")).partition("/")[0] for one in objects}
    for stage in sorted(stages):
        there = storage.join(url, stage)
        if not (found := manifest.found_in(there, objects)):
            continue
        run_dir = RunDir(folder / paths.check_name(stage, "stage name"))
        now = manifest.read(found)
        mirror = Mirror(there, run_dir.path)
        paths.make_private(run_dir.path)
        with files.lock(mirror.lock):
            if now.number <= mirror.number():  # what runs here writes it
                continue
            for file in (run_dir.metrics, run_dir.state):
                if entry := now.files.get(file.name):
                    manifest.fetch(there, entry, file)
            move_marker(run_dir.path, now.root)


def newest_checkpoint(url: str) -> str | None:
    """The name of the newest checkpoint of the run in `url`."""
    named = [Path(name).name for name in manifest.newest(url).files]
    known = [name for name in named if checkpoint_files.NAME.fullmatch(name)]
    return max(known, key=checkpoint_files.position, default=None)


def begin_anew(url: str) -> None:
    """Have the run in `url` hold nothing; what it held stays in the bucket, named in the manifest's `aside`."""
    before = manifest.newest(url)
    if before.files:
        aside = [*before.aside, before.files]
        manifest.write(url, replace(before, number=before.number + 1, files={}, aside=aside))


def brought(cfg: C, run_dir: RunDir) -> C:
    """A program's configuration with files in place of URLs: checkpoints and weights. Raises: see `fetch`."""
    given = {field.name: getattr(cfg, field.name) for field in fields(cfg)}
    urls = {key: value for key, value in given.items() if key in FILE_KEYS and value and storage.is_url(value)}
    return replace(cfg, **{key: str(fetch(url, paths.staging_root(run_dir))) for key, url in urls.items()})


def fetch(path: str | Path, root: Path) -> Path:
    """A local file: a path as it is, an object, see `find`, from the cache below `root`.

    Raises: InputError when there is neither; CheckpointError for another content than the manifest's.
    """
    if (file := storage.local(path)) is not None:
        return file
    of, digest = find(str(path))
    file = object_cache.Cache(root / "objects").file(of)
    if digest and files.sha256(file) != digest:
        raise CheckpointError(f"{path}: damaged: its sha256 is not the one in the manifest")
    return file


def find(url: str) -> tuple[Info, str | None]:
    """An object; and if it is below a run directory, such as gs://bucket/runs/mine/r3/checkpoints/best.pth, the one
    that the manifest there names so, with its sha256. Raises: InputError when there is neither.
    """
    try:
        return storage.info(url), None
    except InputError:
        base = url.rpartition("/")[0]
        for _ in range(2):  # in the run directory, or in its checkpoints
            if base.count("/") < 3:  # a bucket
                break
            if entry := manifest.newest(base).files.get(url[len(base) + 1 :]):
                return storage.info(storage.join(base, entry.object)), entry.sha256
            base = base.rpartition("/")[0]
        raise
