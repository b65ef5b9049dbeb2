"""Reading images straight from an archive, against reading unpacked files, a mount, and unpacking at all.

    python -m bench.archive [--files 2000] [--small 20000] [--rounds 5]

The images are PNG of 224x224 pixels, 100 KB, each another one; reads are in random order from the page cache. CPU time,
except where a part of the work is done by another process or by the disk: there wall time.
"""

from __future__ import annotations

import io
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from bench.measure import Row, arguments, race, rates, report, seconds, wall
from utils import squashfs_direct, squashfs_index, squashfs_mount
from utils.archive import Archive
from utils.files import sha256
from utils.sample_scenes import scene
from utils.squashfs_unpack import flush
from utils.tree import Tree

LIMIT = 60e-6  # s a file to make the index
LOAD = 0.010  # s to load it
SIDE = 224
OPTIONS = {
    "zstd": ("-comp", "zstd", "-Xcompression-level", "1"),
    "lz4": ("-comp", "lz4"),
    "none": ("-noI", "-noD", "-noF"),
    "gzip": ("-comp", "gzip", "-Xcompression-level", "1"),
}


def write_images(root: Path, count: int) -> list[Path]:
    """Photo-like PNG, the noise of a camera included: so they are as large as those of a camera."""
    pictures = [np.asarray(scene(np.random.default_rng(seed), SIDE, SIDE, 3)[0]) for seed in range(16)]
    rng, paths = np.random.default_rng(0), []
    for number in range(count):
        noise = rng.normal(0, 6, (SIDE, SIDE, 3))
        pixels = np.clip(pictures[number % len(pictures)] + noise, 0, 255).astype(np.uint8)
        path = root / f"{number // 1000:03}" / f"{number:07}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG", compress_level=1)
        path.write_bytes(file.getvalue())
        paths.append(path)
    return paths


def pack(source: Path, archive: Path, *options: str) -> Archive:
    command = ["mksquashfs", str(source), str(archive), *options, "-quiet", "-no-progress"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return Archive(archive, sha256(archive), archive.with_suffix(".npz"))


def read_tree(tree: Tree, order: list[int]) -> None:
    for number in order:
        tree.read(number)


def read_files(paths: list[Path], order: list[int]) -> None:
    for number in order:
        with open(paths[number], "rb") as file:
            file.read()


def index_rows(folder: Path, small: int, rounds: int) -> list[Row]:
    """Making and loading the index of an archive of many small files."""
    for number in range(small):
        path = folder / "small" / f"{number // 1000}" / f"{number}.yml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"bboxes: [[{number}, 0, 1, 1]]\n")
    tree = pack(folder / "small", folder / "small.sqsh")
    build = min(seconds(partial(squashfs_index.build, tree.path), time.process_time) for _ in range(rounds)) / small
    cache = folder / "small.npz"
    load = min(seconds(partial(squashfs_index.load, tree.path, tree.fingerprint, cache), wall) for _ in range(rounds))
    return [
        Row(f"index of {small:,} files made", f"{1e6 * build:.1f} us/file", "60 us/file, the limit", LIMIT / build, 1),
        Row(f"index of {small:,} files loaded", f"{1e3 * load:.1f} ms", "10 ms, the limit", LOAD / load, 1),
    ]


def inflate_row(folder: Path, rounds: int) -> Row:
    """Images that are not compressed themselves, from a gzip archive; zlib alone, with the same bytes in memory."""
    (folder / "pixels").mkdir()
    for number in range(48):
        pixels = np.asarray(scene(np.random.default_rng(number), SIDE, SIDE, 3)[0])
        (folder / "pixels" / f"{number}.rgb").write_bytes(pixels.tobytes())
    tree = pack(folder / "pixels", folder / "pixels.sqsh", "-comp", "gzip", "-no-fragments")
    contents = [tree.read(number) for number in range(len(tree))]
    block = 1 << 17
    packed = [zlib.compress(one[start : start + block], 1) for one in contents for start in range(0, len(one), block)]

    def inflate() -> None:
        for data in packed:
            zlib.decompress(data, bufsize=block)

    ours = partial(read_tree, tree, list(range(len(tree))))
    claim = "reads of deflated blocks, gzip; zlib alone"
    return rates(claim, ours, inflate, items=len(tree), unit="files", goal=0.8, rounds=rounds)


def staging_row(tree: Archive, folder: Path, size: int, rounds: int) -> Row:
    """The archive copied and hashed, against unpacked by `unsquashfs`; both until it is on the disk."""

    def copy() -> None:
        squashfs_direct.copy_whole(tree.path, folder / "copy.sqsh", None)

    def unpack() -> None:
        shutil.rmtree(folder / "unpacked", ignore_errors=True)
        subprocess.run(
            ["unsquashfs", "-n", "-q", "-d", folder / "unpacked", tree.path], check=True, capture_output=True
        )
        flush(folder / "unpacked")

    ours, peer, ratio = race(copy, unpack, rounds=rounds, clock=wall)
    return Row(
        "copied whole with its sha256, wall; unsquashfs",
        f"{size / ours / 2**20:,.0f} MiB/s",
        f"{size / peer / 2**20:,.0f} MiB/s",
        ratio,  # no goal: both wait for the disk
    )


def main() -> None:
    given = arguments(__doc__, files=2000, small=20_000, rounds=5)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = write_images(folder / "images", given.files)
        size = sum(path.stat().st_size for path in paths)
        print(f"{given.files} PNG, {size / given.files / 1000:.0f} KB each", file=sys.stderr)
        order = random.Random(0).choices(range(given.files), k=2 * given.files)
        plain = partial(read_files, paths, order)
        trees = {method: pack(folder / "images", folder / f"{method}.sqsh", *OPTIONS[method]) for method in OPTIONS}
        for method, tree in trees.items():
            ours = partial(read_tree, tree, order)
            goal = None if method == "gzip" else 1.0  # some of its blocks are deflated a second time
            claim = f"random reads, {method}; plain files"
            rows.append(rates(claim, ours, plain, items=len(order), unit="images", goal=goal, rounds=given.rounds))
        rows.append(inflate_row(folder, given.rounds))
        rows += index_rows(folder, given.small, given.rounds)
        if shutil.which("squashfuse") and os.access("/dev/fuse", os.W_OK):
            mounted, some = squashfs_mount.mount(trees["zstd"], folder), order[:500]
            rows.append(
                rates(
                    "random reads, zstd, wall; squashfuse",
                    partial(read_tree, trees["zstd"], some),
                    partial(read_tree, mounted, some),
                    items=len(some), unit="images", goal=1.0, rounds=given.rounds, clock=wall,
                )
            )  # fmt: skip
            squashfs_mount.unmount_all()
        rows.append(staging_row(trees["zstd"], folder, size, 3))
    report("Reading from the archive", rows)


if __name__ == "__main__":
    main()
