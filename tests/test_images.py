"""Image files that are damaged or mean harm: named and refused, and nothing is decoded that could fill the memory."""

from __future__ import annotations

import io
import struct
import sys
import zlib
from pathlib import Path
from random import Random

import numpy as np
import pytest
from PIL import Image, ImageFile
from torch.utils.data import DataLoader, Dataset

from tests.ranks import run
from utils import images
from utils.errors import InputError, message
from utils.images import MAX_PIXELS
from utils.paths import ROOT
from utils.tree import Folder


def encoded(kind: str) -> bytes:
    file = io.BytesIO()
    Image.frombytes("RGB", (64, 48), Random(0).randbytes(64 * 48 * 3)).save(file, kind)
    return file.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, *extra: bytes) -> bytes:
    """A PNG whose data is 100 black bytes, whatever it says."""
    header = chunk(b"IHDR", struct.pack(">2I5B", width, height, 8, 0, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(100)))
    return b"".join([b"\x89PNG\r\n\x1a\n", header, *extra, pixels, chunk(b"IEND", b"")])


def jpeg(width: int, height: int) -> bytes:
    """A JPEG that claims another size."""
    data = encoded("JPEG")
    size = data.index(b"\xff\xc0") + 5
    return data[:size] + struct.pack(">2H", height, width) + data[size + 4 :]


BOMB = zlib.compress(bytes(200_000_000))  # 200 kB
PROGRAMS = ("detect_train", "evaluate", "jobs", "ssl_train", "utils")
OVER = f"over the limit of {MAX_PIXELS} pixels"
BAD = {
    "pixels.png": (png(20_000, 20_000), f"image of 20000x20000 is {OVER}"),
    "pixels.jpg": (jpeg(65_500, 65_500), f"image of 65500x65500 is {OVER}"),
    "just_over.png": (png(MAX_PIXELS + 1, 1), f"image of {MAX_PIXELS + 1}x1 is {OVER}"),
    "text.png": (png(9, 9, chunk(b"zTXt", b"key\0\0" + BOMB)), "unreadable image: Decompressed data too large"),
    "profile.png": (png(9, 9, chunk(b"iCCP", b"key\0\0" + BOMB)), "unreadable image: Decompressed data too large"),
    "size.png": (png(0, 9), "unreadable image: neither PNG nor JPEG"),
    "size.jpg": (jpeg(9, 0), "unreadable image: neither PNG nor JPEG"),
    "cut.png": (encoded("PNG")[:3000], "unreadable image: image file is truncated"),
    "cut.jpg": (encoded("JPEG")[:1500], "unreadable image: image file is truncated"),
    "page.jpg": (b"<!DOCTYPE html><html>404</html>", "unreadable image: neither PNG nor JPEG"),
    "empty.jpg": (b"", "unreadable image: neither PNG nor JPEG"),
    "script.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "unreadable image: neither PNG nor JPEG"),
    "chunk.png": (png(9, 9)[:33] + b"\x7f\xff\xff\xfftEXt", "unreadable image: Truncated File Read"),
    "animation.png": (png(9, 9, chunk(b"acTL", b"\0")), "unreadable image: APNG contains truncated acTL chunk"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_image_is_named(name: str) -> None:
    content, reason = BAD[name]
    with pytest.raises(InputError) as caught:
        images.decode(content, f"some/{name}")
    assert str(caught.value).startswith(f"some/{name}: {reason}")
    size, problem = images.check(content, f"some/{name}")
    assert size is None and problem and problem.startswith(reason)


class Pictures(Dataset[int]):
    """The widths of a folder's images."""

    def __init__(self, root: Path) -> None:
        self.tree = Folder(root)

    def __len__(self) -> int:
        return len(self.tree)

    def __getitem__(self, i: int) -> int:
        return images.decode(self.tree.read(i), self.tree.shown(i)).width


def test_a_bad_image_is_named_by_a_loader_s_worker(tmp_path: Path) -> None:
    for name, (content, _) in BAD.items():
        (tmp_path / name).write_bytes(content)
    data = Pictures(tmp_path)
    iterator, said = iter(DataLoader(data, num_workers=1)), []
    for _ in BAD:
        try:
            next(iterator)
        except InputError as error:
            said.append(message(error))
    assert next(iterator, None) is None  # the worker has ended
    assert len(said) == len(data)
    for name, text in zip(sorted(BAD), said, strict=True):
        assert text.startswith(f"{tmp_path}/{name}: {BAD[name][1]}")


def test_a_bomb_in_a_worker_ends_the_program_with_2_in_little_memory(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded("PNG"))
    (tmp_path / "b.png").write_bytes(png(20_000, 20_000))
    code = """
import resource, sys
from pathlib import Path
import torch
from tests.test_images import Pictures
from utils import loader
from utils.errors import cli

def main():
    data = Pictures(Path(sys.argv[1]))
    batches = loader.make(data, loader.WholeBatches(2, 1), workers=1, device=torch.device("cpu"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kB; the worker is a fork of this process
    try:
        for _ in batches:
            print("a batch")
    finally:
        del batches
        print((resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss - before) // 1024, "MB")

cli(main)
"""
    done = run([sys.executable, "-c", code, tmp_path])
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1] == f"ERROR 2: {tmp_path}/b.png: image of 20000x20000 is {OVER}"
    first, used = done.stdout.splitlines()
    assert first == "a batch" and int(used.split()[0]) < 200


def test_the_largest_image_is_read() -> None:
    file = io.BytesIO()
    Image.new("1", (MAX_PIXELS // 1000, 1000)).save(file, "PNG")
    assert images.check(file.getvalue(), "a.png") == ((MAX_PIXELS // 1000, 1000), None)
    assert images.decode(file.getvalue(), "a.png").size == (MAX_PIXELS // 1000, 1000)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_bytes_after_the_end_do_not_condemn_an_image(kind: str) -> None:
    assert images.check(encoded(kind) + bytes(1000), "") == ((64, 48), None)
    assert images.decode(encoded(kind) + bytes(1000), "").size == (64, 48)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_damage_is_never_anything_but_an_input_error(kind: str) -> None:
    good, random, refused = encoded(kind), Random(0), 0
    for _ in range(1500):
        data = bytearray(good[: random.choice([len(good), random.randrange(len(good))])])
        for _ in range(random.choice([0, 1, 3])):
            if data:
                data[random.randrange(min(len(data), random.choice([64, 700])))] = random.randrange(256)
        images.check(bytes(data), "x")
        try:
            images.decode(bytes(data), "x")
        except InputError:
            refused += 1
    assert refused > 300


def test_half_an_image_is_never_made_up() -> None:
    """The switch that fills what is missing with grey."""
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    programs = [path for folder in PROGRAMS for path in (ROOT / folder).rglob("*.py")]
    assert programs and not [path for path in programs if "LOAD_TRUNCATED_IMAGES" in path.read_text()]


def test_16_bits_of_gray_keep_their_shades() -> None:
    levels = np.array([[0, 255, 256, 1000], [30000, 32768, 65280, 65535]], np.uint16)
    content = io.BytesIO()
    Image.fromarray(levels).save(content, "PNG")
    decoded = np.asarray(images.decode(content.getvalue(), "gray.png"))
    assert np.array_equal(decoded, np.repeat((levels >> 8)[..., None], 3, axis=2))
