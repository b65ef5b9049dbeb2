"""Photo-like scenes with known objects, drawn with numpy: what the demo trains on.

A scene is rendered at twice its size: a textured surface lit from one side, then the objects from back to
front with their shadows, then the lens (blur, vignette) and the sensor (colour cast, noise). Alpha masks come
from signed distances, so the boxes around them are exact.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageFilter

from utils.sample_objects import CLASSES, DRAW, Array, Rng, box, colour, disc, lay, rotate

OVERSAMPLE = 2
REACH = 1.35  # no object reaches further from its centre than this many of its units
VISIBLE = 0.65  # the share of an object that must stay in view: inside the picture, and not behind another
ATTEMPTS = 12
UPRIGHT = ("clock", "mug")  # the others lie any way round
TALL = ("ball", "clock", "mug")  # longer shadows


def resize(image: Array, height: int, width: int) -> Array:
    """Bicubic resize of a [h, w] field."""
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


def blur(image: Array, radius: float) -> Array:
    """Gaussian blur of a [h, w] field in 0..1; the field is stored in 8 bits, enough for shadows."""
    picture = Image.fromarray((image * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(radius))
    return np.asarray(picture, np.float32) / 255


def fractal(rng: Rng, height: int, width: int, cells: int = 4, octaves: int = 4) -> Array:
    """Fractal noise [h, w] of about unit range around 0: octaves of smooth noise, each half as strong."""
    total = np.zeros((height, width), np.float32)
    for octave in range(octaves):
        side = min(cells << octave, height, width)
        total += resize(rng.standard_normal((side, side), np.float32), height, width) * 0.5**octave
    return total / 2


def surface(rng: Rng, height: int, width: int) -> tuple[Array, float]:
    """A table, floor or cloth [h, w, 3], from above or running away to a wall, and how far down it starts."""
    y, x = np.mgrid[:height, :width].astype("f") / min(height, width)
    horizon = rng.uniform(-0.2, 0.35) if rng.random() < 0.6 else None
    if horizon is None:
        turn = rng.uniform(0, np.pi)
        s, t = rotate(x, y, turn)
    else:
        t = 0.6 / (np.maximum(y - horizon, 0) + 0.15)
        s, t = (x - rng.uniform(0.3, 0.7)) * t + 3, t * 1.2
    tile = fractal(rng, 128, 128, 8)
    tile = np.block([[tile, tile[:, ::-1]], [tile[::-1], tile[::-1, ::-1]]])  # repeats without a seam

    def grain(along: float, across: float) -> Array:
        return tile[(t * across).astype(int) % 256, (s * along).astype(int) % 256]

    hue = float(rng.choice([0.02, 0.08, 0.12, 0.55, 0.6]))
    base = colour(rng, (hue, hue + 0.05), (0.03, 0.35), (0.35, 0.85))
    kind = rng.integers(4)
    if kind == 0:  # planks
        base = colour(rng, (0.05, 0.11), (0.25, 0.6), (0.35, 0.8))
        plank = np.floor(t * rng.uniform(3, 6))
        pattern = 0.2 * grain(25, 300) + 0.12 * np.sin(plank * 12.9) - 0.35 * (np.abs(t * 4 % 1 - 0.5) > 0.48)
    elif kind == 1:  # tiles
        size = rng.uniform(2, 5)
        seam = np.maximum(np.abs(s * size % 1 - 0.5), np.abs(t * size % 1 - 0.5)) > 0.46
        check = rng.uniform(0, 0.3) * ((np.floor(s * size) + np.floor(t * size)) % 2)
        pattern = 0.12 * grain(120, 120) - 0.3 * seam + check - 0.1
    elif kind == 2:  # woven cloth
        weave = np.sin(s * 150) * np.sin(t * 150)
        pattern = 0.15 * grain(60, 60) + 0.1 * weave + 0.15 * (np.sin(s * 20) > 0.6)
    else:  # stone or lawn
        base = colour(rng, (0.2, 0.32), (0.3, 0.6), (0.3, 0.6)) if rng.random() < 0.4 else base
        pattern = 0.3 * grain(150, 150) + 0.15 * grain(40, 40)
    canvas = base * (1 + pattern)[..., None]
    if horizon is not None:
        paint = colour(rng, (0, 1), (0.03, 0.3), (0.3, 0.9))
        wall = paint * (1 + 0.2 * fractal(rng, height, width, 3, 2))[..., None]
        canvas = lay(canvas, np.clip((horizon - y) * 60, 0, 1), wall)
    return canvas, 0.0 if horizon is None else horizon * min(height, width) / height


def clutter(rng: Rng, canvas: Array) -> Array:
    """Things out of focus and pools of light: what a detector must learn to ignore."""
    height, width = canvas.shape[:2]
    y, x = np.mgrid[:height, :width].astype("f") / min(height, width)
    for _ in range(rng.integers(4)):
        u, v = x - np.float32(rng.uniform(0, width / height)), y - np.float32(rng.uniform(0, 1))
        turn = rng.uniform(0, np.pi)
        u, v = rotate(u, v, turn)
        size = rng.uniform(0.05, 0.3, 2).tolist()
        distance = box(u, v, *size) if rng.random() < 0.5 else disc(u, v * 1.5, size[0])
        soft = np.clip(0.5 - distance / rng.uniform(0.05, 0.15), 0, 1) * rng.uniform(0.3, 0.8)
        canvas = lay(canvas, soft, colour(rng, (0, 1), (0, 0.6), (0.15, 0.9)))
    return canvas * (1 + 0.22 * fractal(rng, height, width, 2, 2))[..., None]


def render(rng: Rng, name: str, radius: float, light: Array) -> tuple[Array, Array]:
    """One object alone: alpha [side, side] and colour [side, side, 3], `radius` pixels a unit."""
    side = int(2 * radius * REACH)
    y, x = (np.mgrid[:side, :side].astype("f") + 0.5 - side / 2) / np.float32(radius)
    turn = rng.uniform(-0.3, 0.3) if name in UPRIGHT else rng.uniform(-np.pi, np.pi)
    local = np.array([*rotate(light[0], light[1], turn), light[2]], np.float32)
    distance, rgb = DRAW[name](*rotate(x, y, turn), local, rng)
    grain = 1 + 0.08 * fractal(rng, side, side, 8)
    return np.clip(0.5 - distance * np.float32(radius), 0, 1), rgb * grain[..., None]


def paste(patch: Array, top: int, left: int, rows: int, columns: int) -> Array:
    """An otherwise empty [rows, columns, ...] field with `patch` at (top, left), cut at the edges."""
    field = np.zeros((rows, columns, *patch.shape[2:]), np.float32)
    y, x = max(top, 0), max(left, 0)
    part = patch[y - top : rows - top, x - left : columns - left]
    field[y : y + part.shape[0], x : x + part.shape[1]] = part
    return field


def camera(rng: Rng, canvas: Array, width: int, height: int) -> Image.Image:
    """Lens and sensor: vignette, exposure, colour cast, blur, and noise at the final size."""
    y, x = np.mgrid[-1 : 1 : canvas.shape[0] * 1j, -1 : 1 : canvas.shape[1] * 1j].astype("f")
    falloff = 1 - rng.uniform(0, 0.25) * (x * x + y * y)
    gain = rng.uniform(0.85, 1.3) * rng.uniform(0.92, 1.08, 3).astype("f")
    exposed = np.maximum(canvas * falloff[..., None] * gain, 0)
    exposed /= (1 + exposed**4) ** 0.25  # highlights roll off instead of clipping
    picture = Image.fromarray((exposed * 255).astype(np.uint8))
    picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 1.3)))
    final = np.asarray(picture.resize((width, height), Image.Resampling.BOX), np.float32)
    noisy = final + rng.uniform(1, 6) * rng.standard_normal(final.shape, np.float32)
    return Image.fromarray(np.clip(noisy + 0.5, 0, 255).astype(np.uint8))


def scene(
    rng: Rng, width: int, height: int, count: int, sizes: tuple[float, float] = (0.16, 0.3)
) -> tuple[Image.Image, list[list[float]], list[str]]:
    """Draw one scene of up to `count` objects, `sizes` their half extent as a share of the shorter side.

    Returns the picture (RGB, `width` x `height`), the boxes [xmin, ymin, xmax, ymax] in its pixels around
    what is visible of each object, and the class names. Where no attempt finds an object a place that leaves
    everything visible, it is left out: no drawn object is without its box.
    """
    rows, columns = height * OVERSAMPLE, width * OVERSAMPLE
    angle = rng.uniform(0.15, 0.85) * np.pi
    light = np.array([0.7 * np.cos(angle), -0.5 * np.sin(angle), 0.65], "f")
    light /= np.linalg.norm(light)
    canvas, horizon = surface(rng, rows, columns)
    canvas = clutter(rng, canvas)
    masks: list[Array] = []  # what is still visible of each object
    full: list[float] = []  # its whole area
    names: list[str] = []
    for name in rng.choice(CLASSES, count):
        radius = rng.uniform(*sizes) * min(rows, columns)
        alpha, rgb = render(rng, name, radius, light)
        for _ in range(ATTEMPTS):
            top = int(rng.uniform(max(horizon, 0.1), 0.95) * rows - len(alpha) / 2)
            left = int(rng.uniform(0.05, 0.95) * columns - len(alpha) / 2)
            mask = paste(alpha, top, left, rows, columns)
            kept = [visible * (1 - mask) for visible in masks]
            areas = [float(visible.sum()) for visible in (*kept, mask)]
            if all(area >= VISIBLE * whole for area, whole in zip(areas, (*full, alpha.sum()), strict=True)):
                break
        else:
            continue
        reach = radius * (0.3 if name in TALL else 0.12)
        cast = paste(alpha, top - int(reach * light[1]), left - int(reach * light[0]), rows, columns)
        small = blur(resize(cast, rows // 4, columns // 4).clip(0, 1), reach / 8)
        canvas = canvas * (1 - 0.55 * resize(small, rows, columns))[..., None]
        canvas = lay(canvas, mask, paste(rgb, top, left, rows, columns))
        masks, full, names = [*kept, mask], [*full, float(alpha.sum())], [*names, str(name)]
    boxes = []
    for visible in masks:
        y, x = (np.flatnonzero((visible > 0.5).any(axis)) / OVERSAMPLE for axis in (1, 0))
        edge = 1 / OVERSAMPLE
        boxes.append([float(x[0]), float(y[0]), float(x[-1] + edge), float(y[-1] + edge)])
    return camera(rng, canvas, width, height), boxes, names
