"""Decoding an image: Pillow, which this project uses, against OpenCV and torchvision, and against reading the cache.

    python -m bench.decode [--images 32]

PNG of 224x224 and JPEG of 500x375 with quality 94, generated photographs. Speed is not all: a decoder has to refuse
a file that is cut, and to read grayscale, palette, 16-bit and CMYK as Pillow does. What each does is printed.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from torchvision import io as torchvision_io

from bench.measure import Row, arguments, cpu, race, rates, report, seconds
from utils import image_cache, images
from utils.sample_scenes import scene
from utils.tree import Folder

Decode = Callable[[bytes], np.ndarray]
PASSES = 8  # over the images: CPU time is counted in hundredths of a second


def by_pillow(content: bytes) -> np.ndarray:
    return np.asarray(images.decode(content, "bench"))


def by_opencv(content: bytes) -> np.ndarray:
    found = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR_RGB)
    if found is None:
        raise ValueError("not decoded")
    return found


def by_torchvision(content: bytes) -> np.ndarray:
    data = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    return torchvision_io.decode_image(data, torchvision_io.ImageReadMode.RGB).permute(1, 2, 0).numpy()


def all_of(contents: list[bytes], decode: Decode) -> None:
    for content in contents * PASSES:
        decode(content)


OTHERS: dict[str, Decode] = {"OpenCV": by_opencv, "torchvision": by_torchvision}


def encoded(picture: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, quality=94)
    return file.getvalue()


def faults(decode: Decode) -> str:
    """What a decoder does otherwise than Pillow, or lets pass."""
    picture = scene(np.random.default_rng(0), 120, 90, 3)[0]
    deep = Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)
    kinds = {
        "RGB PNG": encoded(picture, "PNG"),
        "gray PNG": encoded(picture.convert("L"), "PNG"),
        "palette PNG": encoded(picture.quantize(64), "PNG"),
        "RGBA PNG": encoded(picture.convert("RGBA"), "PNG"),
        "16-bit PNG": encoded(deep, "PNG"),
        "RGB JPEG": encoded(picture, "JPEG"),
        "gray JPEG": encoded(picture.convert("L"), "JPEG"),
        "CMYK JPEG": encoded(picture.convert("CMYK"), "JPEG"),
    }
    found = []
    for name, content in kinds.items():
        try:
            apart = np.abs(decode(content).astype(int) - by_pillow(content)).max()
        except (RuntimeError, ValueError) as error:
            found.append(f"{name} refused ({str(error).splitlines()[0][:40]})")
            continue
        if apart:
            found.append(f"{name} up to {apart} levels apart")
    for name in ("RGB PNG", "RGB JPEG"):
        for kept in (0.5, 0.9, 0.99):
            try:
                decode(kinds[name][: int(kept * len(kinds[name]))])
                found.append(f"{name} cut to {kept:.0%} taken")
            except (RuntimeError, ValueError):
                pass
    return ", ".join(found) or "nothing"


def cache(folder: Path, contents: list[bytes]) -> tuple[Row, str]:
    """Reading against decoding, and how long the cache takes to pay."""
    for number, content in enumerate(contents):
        (folder / f"{number}.png").write_bytes(content)
    tree, place, n = Folder(folder), str(folder / "cache"), len(contents)
    build = seconds(lambda: image_cache.of(tree, place, 0), cpu) / n
    decoded, cached = image_cache.Decoded(tree), image_cache.of(tree, place, 0)
    kept = np.empty_like(cached.pixels(0))

    def read() -> None:
        for _ in range(500):
            for index in range(n):
                np.copyto(kept, cached.pixels(index))

    read_time, decode_time, ratio = race(
        read, lambda: [decoded.pixels(index) for _ in range(PASSES) for index in range(n)]
    )
    read_time, decode_time = read_time / (500 * n), decode_time / (PASSES * n)
    row = Row(
        "cache, a copy of an image",
        f"{1 / read_time:,.0f} images/s",
        f"{1 / decode_time:,.0f} images/s",
        500 / PASSES * ratio,
    )
    pays = build / (decode_time - read_time)
    return row, (
        f"cache: {kept.nbytes:,} bytes an image of 224x224 ({kept.nbytes * 512_000 / 1e9:.0f} GB for 512,000) against "
        f"{sum(map(len, contents)) / n:,.0f} of its PNG; built in {build * 1e3:.2f} ms an image, decoded in "
        f"{decode_time * 1e3:.2f}, read in {read_time * 1e3:.3f}: paid after {pays:.1f} epochs"
    )


def main() -> None:
    count = arguments(__doc__, images=32).images
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    rows, streams = [], [np.random.default_rng(number) for number in range(count)]
    files = {
        "PNG 224x224": [encoded(scene(rng, 224, 224, 3)[0], "PNG") for rng in streams],
        "JPEG 500x375": [encoded(scene(rng, 500, 375, 3)[0], "JPEG") for rng in streams],
    }
    for kind, contents in files.items():
        for name, decode in OTHERS.items():
            each = (partial(all_of, contents, how) for how in (by_pillow, decode))
            rows.append(rates(f"{kind}, Pillow against {name}", *each, items=PASSES * count, unit="images"))
    with tempfile.TemporaryDirectory() as folder:
        row, words = cache(Path(folder), files["PNG 224x224"])
    print(words)
    for name, decode in {"Pillow": by_pillow, **OTHERS}.items():
        print(f"{name}, other pixels than Pillow or cut files taken: {faults(decode)}")
    report("decode, per CPU second of one core", [*rows, row])


if __name__ == "__main__":
    main()
