"""Image files: finding them, checking them, opening them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from utils.errors import InputError

SUFFIXES = (".png", ".jpg", ".jpeg")
FORMATS = ("PNG", "JPEG")  # Pillow's other decoders see less use, and one of them starts Ghostscript
MAX_PIXELS = 100_000_000  # a 1 MB file can claim more than a node's memory; 300 MB once decoded
Image.MAX_IMAGE_PIXELS = None  # Pillow only warns up to twice its own limit

# Channel statistics of ImageNet, RGB in [0, 1]: what pretraining and detector both normalise with.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def find(root: Path) -> list[Path]:
    """Every PNG and JPEG below `root`, sorted by path."""
    return sorted(path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())


def load(path: Path) -> Image.Image:
    """The decoded image as RGB. Raises: InputError naming the file."""
    with _opened(path) as image:
        return image.convert("RGB")


def check(path: Path) -> tuple[tuple[int, int] | None, str | None]:
    """((width, height), None) of a usable image, or (None, reason).

    Reads the header and the tail; only a file whose end marker is not where it belongs is decoded
    whole, since cut files keep a good header and files with bytes appended are still good.
    """
    try:
        with _opened(path) as image, open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - 16))
            tail = file.read()
            whole = tail.endswith(b"\xff\xd9") if image.format == "JPEG" else b"IEND\xaeB`\x82" in tail
            if not whole:
                image.load()
            return image.size, None
    except InputError as error:
        return None, str(error).removeprefix(f"{path}: ")


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """The image, of which only the header is read and its size is checked. Raises: InputError, also for the body."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise InputError(f"{path}: image of {width}x{height} is over the limit of {MAX_PIXELS} pixels")
            yield image
    except InputError:
        raise
    except UnidentifiedImageError:
        raise InputError(f"{path}: unreadable image: neither PNG nor JPEG, or cut in its header") from None
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow's two decoders raise for damage
        raise InputError(f"{path}: unreadable image: {error}") from error
