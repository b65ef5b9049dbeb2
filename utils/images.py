"""Image files: checking them and decoding them, from their bytes."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator

from PIL import Image, UnidentifiedImageError

from utils.errors import InputError

SUFFIXES = (".png", ".jpg", ".jpeg")
FORMATS = ("PNG", "JPEG")  # Pillow's other decoders see less use, and one of them starts Ghostscript
MAX_PIXELS = 100_000_000  # a 1 MB file can claim more than a node's memory; 300 MB once decoded
Image.MAX_IMAGE_PIXELS = None  # Pillow only warns up to twice its own limit

# Channel statistics of ImageNet, RGB in [0, 1]: what pretraining and detector both normalise with.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def decode(content: bytes, name: str) -> Image.Image:
    """The image that is a file's content, as RGB. Raises: InputError naming `name`, the file."""
    with _opened(content, name) as image:
        if image.mode.startswith("I"):  # 16 bits of gray: Pillow would cut them off at 255, all white
            return image.point(lambda level: level / 256).convert("RGB")
        return image.convert("RGB")


def check(content: bytes, name: str) -> tuple[tuple[int, int], None] | tuple[None, str]:
    """((width, height), None) of a usable image, or (None, reason), which does not repeat `name`.

    Looks at the header and the tail; only an image whose end marker is not where it belongs is decoded
    whole, since cut files keep a good header and files with bytes appended are still good.
    """
    try:
        with _opened(content, name) as image:
            whole = content.endswith(b"\xff\xd9") if image.format == "JPEG" else b"IEND\xaeB`\x82" in content[-16:]
            if not whole:
                image.load()
            return image.size, None
    except InputError as error:
        return None, str(error).removeprefix(f"{name}: ")


@contextlib.contextmanager
def _opened(content: bytes, name: str) -> Iterator[Image.Image]:
    """The image, of which only the header is read and its size is checked. Raises: InputError, also for the body."""
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise InputError(f"{name}: image of {width}x{height} is over the limit of {MAX_PIXELS} pixels")
            yield image
    except InputError:
        raise
    except UnidentifiedImageError:
        raise InputError(f"{name}: unreadable image: neither PNG nor JPEG, or cut in its header") from None
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow's two decoders raise for damage
        raise InputError(f"{name}: unreadable image: {error}") from error
