"""Image files: finding them, checking them, opening them."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from utils.errors import InputError

SUFFIXES = (".png", ".jpg", ".jpeg")
MAX_PIXELS = 100_000_000  # a 1 MB file can claim more than a node's memory
Image.MAX_IMAGE_PIXELS = MAX_PIXELS

# Channel statistics of ImageNet, RGB in [0, 1]: what pretraining and detector both normalise with.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def find(root: Path) -> list[Path]:
    """Every PNG and JPEG below `root`, sorted by path."""
    return sorted(path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())


def load(path: Path) -> Image.Image:
    """The decoded image as RGB. Raises: InputError naming the file."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: unreadable image: {error}") from error


def check(path: Path) -> tuple[tuple[int, int] | None, str | None]:
    """((width, height), None) of a usable image, or (None, reason).

    Reads the header and the tail; only a file whose end marker is not where it belongs is decoded
    whole, since cut files keep a good header and files with bytes appended are still good.
    """
    try:
        with Image.open(path) as image:
            size, kind = image.size, image.format
            if size[0] * size[1] > MAX_PIXELS:
                return None, f"image of {size[0]}x{size[1]} is over the limit of {MAX_PIXELS} pixels"
            with open(path, "rb") as file:
                file.seek(max(0, path.stat().st_size - 16))
                tail = file.read()
            whole = tail.endswith(b"\xff\xd9") if kind == "JPEG" else b"IEND\xaeB`\x82" in tail
            if not whole:
                image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return None, f"unreadable image: {str(error).replace(str(path), path.name)}"
    return size, None
