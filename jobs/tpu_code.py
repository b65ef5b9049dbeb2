"""The checkout as a TPU VM gets it: what git tracks and what it does not ignore, in a folder named by the content."""

from __future__ import annotations

import gzip
import hashlib
import io
import shlex
import subprocess
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from utils import files
from utils.errors import EnvironmentProblem, InputError
from utils.paths import ROOT

LIMIT = 64  # MiB; a checkout has a few


@dataclass(frozen=True)
class Code:
    folder: str  # on the VM, in the home directory
    content: bytes  # tar
    names: frozenset[str]  # of the files, from the checkout's root

    @property
    def archive(self) -> str:
        return f"{self.folder}.tar.gz"

    def write(self, directory: Path) -> Path:
        path = directory / self.archive
        files.write_atomic(path, lambda file: file.write(gzip.compress(self.content, mtime=0)))
        return path


def pack() -> Code:
    """Raises: EnvironmentProblem where there is no git checkout; InputError for one with more than LIMIT."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, capture_output=True, check=True).stdout.decode(errors="surrogateescape")
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", b"").decode().strip() or error
        raise EnvironmentProblem(f"--cluster tpu copies the files that git lists in {ROOT}: {said}") from None
    names = [name for name in sorted(set(listed.split("\0")) - {""}) if (ROOT / name).is_file()]
    sizes = {name: (ROOT / name).stat().st_size / 2**20 for name in names}
    if (total := sum(sizes.values())) > LIMIT:
        largest = sorted(names, key=lambda name: -sizes[name])[:5]
        listed = ", ".join(f"{name} ({sizes[name]:.1f} MiB)" for name in largest)
        raise InputError(
            f"--cluster tpu copies the files that git lists in {ROOT}: {total:.0f} MiB, and {LIMIT} at most; "
            f"data belongs in a bucket, and what no VM needs in .gitignore; the largest: {listed}"
        )
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", dereference=True) as tar:
        for name in names:
            tar.add(ROOT / name, name, filter=_timeless)
    content = buffer.getvalue()
    return Code(f"relay-{hashlib.sha256(content).hexdigest()[:12]}", content, frozenset(names))


def _timeless(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """The same files are the same bytes, whoever packs them and when."""
    member.mtime = member.uid = member.gid = 0
    member.uname = member.gname = ""
    member.mode = 0o755 if member.mode & 0o100 else 0o644
    return member


def unpack(code: Code) -> str:
    """The shell command by which a host unpacks the copy, in place of older ones, and sets up its environment.

    Again it changes nothing.
    """
    return joined(
        ["mkdir", "-p", code.folder],
        ["tar", "-xzf", code.archive, "-C", code.folder],
        ["cd", code.folder],
        ["python3", "-m", "jobs.tpu_remote", "tidy"],
        ["make", "install-tpu"],
    )


def joined(*commands: Sequence[str]) -> str:
    """Commands as one string for a shell: each only after those before it succeeded."""
    return " && ".join(shlex.join(command) for command in commands)
