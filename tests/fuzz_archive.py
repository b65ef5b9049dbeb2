"""Damaged and hostile archives: what is read is right, or it is an InputError; and it ends, in bounded memory.

    python -m tests.fuzz_archive --cases 5000 [--seed 0]

Each case is an archive of mksquashfs, changed by a random number that depends on seed and case alone. All its files are
read in a process with bounded memory and a bound of CPU time for each case. Where `unsquashfs` accepts the archive as
well, both must give the same content: squashfs has no checksum over data, so content can be wrong and accepted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random

from tests.archives import make_lengths, pack
from utils.archive import Archive
from utils.errors import InputError
from utils.paths import ROOT
from utils.squashfs_reader import Reader

MEMORY = 2 << 30  # bytes of address space, of which Python and numpy take a quarter
SECONDS = 5  # of CPU time for a case
COMPARED = 4  # one case of so many is read by unsquashfs as well
OPTIONS = (
    "-comp gzip", "-comp zstd", "-comp lz4", "-comp xz", "-comp lzma", "-noI -noD -noF", "-noI -comp zstd -noF",
    "-noI -comp lz4 -always-use-fragments", "-noI -noF -no-fragments",
)  # fmt: skip
RAW = [index for index, options in enumerate(OPTIONS) if "-noI" in options]
SUPERBLOCK = [(offset, "<I") for offset in range(0, 20, 4)] + [(offset, "<H") for offset in range(20, 32, 2)]
SUPERBLOCK += [(offset, "<Q") for offset in range(32, 96, 8)]
INTERESTING = (0, 1, 2, 3, 255, 256, 4095, 4096, 8191, 8192, 65535, (1 << 24) - 1, 1 << 24, (1 << 31) - 1, 1 << 31,
               (1 << 32) - 1, 1 << 32, 1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)  # fmt: skip
Change = Callable[[bytearray, Random], None]


def tables(data: bytearray) -> range:
    """Where inodes, directories and what follows them are."""
    return range(min(struct.unpack_from("<Q", data, 64)[0], len(data) - 8), len(data) - 8)


def flip_anywhere(data: bytearray, random: Random) -> None:
    for _ in range(random.randrange(1, 9)):
        data[random.randrange(len(data))] ^= 1 << random.randrange(8)


def flip_in_tables(data: bytearray, random: Random) -> None:
    for _ in range(random.randrange(1, 9)):
        data[random.choice(tables(data))] = random.randrange(256)


def cut(data: bytearray, random: Random) -> None:
    length, size = random.randrange(len(data)), len(data)
    del data[length:]
    if random.random() < 0.5:  # as long as before, the rest not written
        data.extend(bytes(size - length))


def number(random: Random, old: int, width: int, size: int) -> int:
    """A value that a field of `width` bytes could be changed to."""
    choices = (random.choice(INTERESTING), old + random.choice((-1, 1, -8, 8)), random.randrange(size), old ^ 1 << 24)
    return random.choice(choices) % (1 << 8 * width)


def change_superblock(data: bytearray, random: Random) -> None:
    for _ in range(random.randrange(1, 4)):
        offset, form = random.choice(SUPERBLOCK)
        (old,) = struct.unpack_from(form, data, offset)
        struct.pack_into(form, data, offset, number(random, old, struct.calcsize(form), len(data)))


def change_fields(data: bytearray, random: Random) -> None:
    """In tables that are stored as they are these are fields of inodes, directories and fragments."""
    for _ in range(random.randrange(1, 6)):
        offset, form = random.choice(tables(data)), random.choice(("<H", "<I", "<Q"))
        (old,) = struct.unpack_from(form, data, offset)
        struct.pack_into(form, data, offset, number(random, old, struct.calcsize(form), len(data)))


def splice(data: bytearray, random: Random) -> None:
    """One inode, name or block in the place of another."""
    places, length = tables(data), random.randrange(1, 200)
    source, target = random.choice(places), random.choice(places)
    data[target : target + length] = data[source : source + length][: len(data) - target]


CHANGES: tuple[Change, ...] = (
    flip_anywhere, flip_in_tables, cut, change_superblock, change_fields, change_fields, splice, splice,
)  # fmt: skip
OF_RAW = (change_fields, splice)


def read(archive: Path, cache: Path) -> dict[str, bytes | None]:
    """Content by name, None where it is refused. Raises: InputError if all of it is."""
    tree = Archive(archive, "0" * 64, cache)
    found: dict[str, bytes | None] = {}
    for index in range(len(tree)):
        name = tree.name(index)
        found[name] = None
        tree.shown(index), tree.problem(index)
        with contextlib.suppress(InputError):
            found[name] = content = tree.read(index)
            assert len(content) == tree.stamp(index)[0], name
    tree.find("text", (".bin",))
    with Reader(archive) as reader:  # what unpacking without unsquashfs uses
        for entry in reader.walk():
            if entry.kind == "file" and found[entry.path] is not None:
                assert b"".join(reader.read(entry)) == found[entry.path], entry.path
    return found


def differs(archive: Path, ours: dict[str, bytes | None], dest: Path) -> str | None:
    """A file that `unsquashfs` reads without complaint and otherwise.

    What it made a hard link says nothing: files whose inodes were given one number are one file to it.
    """
    command = ["unsquashfs", "-n", "-no-xattrs", "-strict-errors", "-d", str(dest), str(archive)]
    try:
        ended = subprocess.run(command, capture_output=True, timeout=20, preexec_fn=_bound)
        if ended.returncode == 0:
            for name, content in ours.items():
                path = dest / name
                if content is None or not path.is_file() or path.is_symlink() or path.stat().st_nlink > 1:
                    continue
                if path.read_bytes() != content:
                    return name
    except subprocess.TimeoutExpired:
        pass
    finally:
        shutil.rmtree(dest, ignore_errors=True)
    return None


def _bound() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 20, 64 << 20))


def _too_long(*_: object) -> None:
    raise TimeoutError(f"more than {SECONDS} s")


def child(folder: Path, seed: int, first: int, cases: int) -> None:
    """Read the cases; prints a line of JSON for each: number, outcome, and what is wrong."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    signal.signal(signal.SIGPROF, _too_long)
    good = sorted(folder.glob("good*.sqsh"))
    archive, cache = folder / "case.sqsh", folder / "case.npz"
    for case in range(first, first + cases):
        random = Random(f"{seed} {case}")
        change = random.choice(CHANGES)
        data = bytearray(random.choice([good[index] for index in RAW] if change in OF_RAW else good).read_bytes())
        change(data, random)
        archive.write_bytes(data)
        cache.unlink(missing_ok=True)
        print(case, end=" ", flush=True)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        outcome, wrong = "read", ""
        found: dict[str, bytes | None] = {}
        try:
            found = read(archive, cache)
            outcome = "some files refused" if None in found.values() else "read"
        except InputError as error:
            outcome, wrong = "refused", "" if str(error).startswith(str(archive)) else f"no name: {error}"
        except BaseException as error:
            wrong = f"{type(error).__name__}: {error}"
        signal.setitimer(signal.ITIMER_PROF, 0)
        if not wrong and found and case % COMPARED == 0 and (name := differs(archive, found, folder / "out")):
            wrong = f"{name!r} is not as unsquashfs has it"
        print(json.dumps([outcome, wrong]), flush=True)


def run(cases: int, seed: int = 0) -> tuple[Counter[str], list[str]]:
    """How often each outcome was, and what went wrong in which case."""
    room = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=room if room.is_dir() else None) as name:
        folder = Path(name)
        source = make_lengths(folder / "source", 4096)
        (source / "many").mkdir()
        for index in range(300):  # their inodes and names are in several metadata blocks
            (source / "many" / f"{index}.txt").write_text(str(index))
        for index, options in enumerate(OPTIONS):
            pack(source, folder / f"good{index}.sqsh", "-b", "4096", "-nopad", *options.split())
        outcomes, wrong, case = Counter[str](), list[str](), 0
        while case < cases:
            command = [sys.executable, "-m", "tests.fuzz_archive", "--cases", str(cases - case)]
            command += ["--seed", str(seed), "--first", str(case), "--child", str(folder)]
            ended = subprocess.run(
                command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True
            )
            for line in ended.stdout.splitlines():
                case, _, result = int(line.split(" ")[0]) + 1, *line.partition(" ")[1:]
                outcome, problem = json.loads(result) if result else ("killed", f"exit code {ended.returncode}")
                outcomes[outcome] += 1
                wrong += [f"case {case - 1}: {problem}"] if problem else []
            if not ended.stdout:
                raise RuntimeError(f"the reading process ended with {ended.returncode} before its first case")
    return outcomes, wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser("python -m tests.fuzz_archive")
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--child", type=Path)
    given = parser.parse_args()
    if given.child:
        child(given.child, given.seed, given.first, given.cases)
    else:
        outcomes, wrong = run(given.cases, given.seed)
        print("\n".join([*wrong, ", ".join(f"{outcome}: {count}" for outcome, count in outcomes.most_common())]))
        sys.exit(bool(wrong))
