"""The demo's objects, drawn with numpy: a signed distance function for the outline, shading for the inside.

Each drawing function takes coordinates u (right) and v (down) [h, w] in units of the object's size, the
direction to the light [3] and a random generator. It returns the signed distance [h, w] (negative inside) and
the colour [h, w, 3] in sRGB values 0..1. All arrays are float32.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Rng = np.random.Generator
Patch = tuple[Array, Array]
Drawing = Callable[[Array, Array, Array, Rng], Patch]
Range = tuple[float, float]


def colour(rng: Rng, hue: Range, saturation: Range, value: Range) -> Array:
    """A random RGB colour [3] from ranges of hue, saturation and value."""
    hsv = rng.uniform(*hue) % 1, rng.uniform(*saturation), rng.uniform(*value)
    return np.array(colorsys.hsv_to_rgb(*hsv), np.float32)


def rotate(x: Array, y: Array, turn: float) -> tuple[Array, Array]:
    """Coordinates (x, y) seen from axes turned by `turn` radians."""
    c, s = np.float32(np.cos(turn)), np.float32(np.sin(turn))
    return c * x + s * y, c * y - s * x


def disc(u: Array, v: Array, radius: float = 1.0) -> Array:
    return np.hypot(u, v) - np.float32(radius)


def box(u: Array, v: Array, half_width: float, half_height: float, corner: float = 0.03) -> Array:
    """Signed distance to an upright rounded rectangle around the origin."""
    x, y = np.abs(u) - half_width + corner, np.abs(v) - half_height + corner
    return np.hypot(np.maximum(x, 0), np.maximum(y, 0)) + np.minimum(np.maximum(x, y), 0) - corner


def lay(under: Array, mask: Array, over: Array | float) -> Array:
    """`over` on top of `under` where the boolean or fractional mask [h, w] says so."""
    return under + (over - under) * mask[..., None].astype(np.float32)


def ball(u: Array, v: Array, light: Array, rng: Rng) -> Patch:
    """A beach ball: coloured segments from pole to pole, turned any way."""
    depth = np.sqrt(np.maximum(1 - u * u - v * v, 0))
    normal = np.stack([u, v, depth], -1)
    axes = np.linalg.qr(rng.standard_normal((3, 3)))[0].astype("f")
    x, y, z = np.moveaxis(normal @ axes, -1, 0)
    segment = ((np.arctan2(y, x) / np.pi + 1) * 3).astype(int) % 6
    hue = rng.uniform(0, 1)
    first, second = (colour(rng, (hue + k, hue + k + 0.1), (0.75, 1), (0.7, 1)) for k in (0, 0.4))
    white = np.full(3, 0.93, "f")
    rgb = np.stack([first, white, second, white, first, white])[segment]
    rgb = lay(rgb, np.abs(z) > 0.93, white)
    rgb = rgb * (0.3 + 0.8 * np.maximum(normal @ light, 0))[..., None]
    half = light + np.array([0, 0, 1], np.float32)  # between the light and the eye, for the highlight
    return disc(u, v), lay(rgb, 0.7 * np.maximum(normal @ (half / np.linalg.norm(half)), 0) ** 40, 1.0)


def mug(u: Array, v: Array, light: Array, rng: Rng) -> Patch:
    """A mug seen a little from above: cylinder shading, a dark inside, a handle, a band or stripes."""
    wide, tall = rng.uniform(0.55, 0.68), rng.uniform(0.6, 0.75)
    flat = rng.uniform(0.22, 0.34)  # how far an end's ellipse is foreshortened
    side = int(rng.choice([-1, 1]))
    top, bottom = ((disc(u, (v - at) / flat, wide) * flat) for at in (-tall, tall))
    body = np.minimum(np.minimum(box(u, v, wide, tall), top), bottom)
    handle = np.abs(disc((u - side * wide) / 0.85, v, 0.42)) - 0.1
    glaze = colour(rng, (0, 1), (0.05, 0.9), (0.45, 0.95))
    curve = np.clip(u / np.float32(wide), -1, 1)
    lit = 0.45 + 0.6 * np.maximum(curve * light[0] + np.sqrt(1 - curve * curve) * light[2], 0)
    height = (v - flat * np.sqrt(np.maximum(wide * wide - u * u, 0))) / tall  # -1 at the rim, 1 at the foot
    start = rng.uniform(-0.6, 0.2)
    band = colour(rng, (0, 1), (0.1, 0.9), (0.3, 1))
    rgb = lay(np.broadcast_to(glaze, (*u.shape, 3)), (height > start) & (height < start + 0.35), band)
    rgb = lay(rgb * lit[..., None], 0.5 * np.exp(-(((curve - 0.6 * np.sign(light[0])) / 0.09) ** 2)), 1.0)
    rgb = lay(rgb, body > 0, glaze * (0.75 - 0.9 * np.clip(handle + 0.05, -0.2, 0.2)[..., None]))
    rgb = lay(rgb, top < 0, np.minimum(glaze * 1.15 + 0.05, 1))
    inner = disc(u, (v + tall) / flat, wide - 0.07) * flat
    rgb = lay(rgb, inner < 0, glaze * (0.35 - 0.2 * np.sign(light[0]) * curve)[..., None])
    drink = disc(u, (v + tall - 0.1) / flat, wide - 0.13) * flat
    return np.minimum(body, handle), lay(rgb, (drink < 0) & (inner < 0), np.array([0.2, 0.1, 0.05], "f"))


def book(u: Array, v: Array, light: Array, rng: Rng) -> Patch:
    """A closed book lying down: cover with a spine, a frame and a title; the block of pages below it."""
    u = u + np.float32(rng.uniform(-0.25, 0.25)) * v
    wide, tall, thick = rng.uniform(0.5, 0.64), rng.uniform(0.72, 0.86), rng.uniform(0.1, 0.2)
    cloth = colour(rng, (0, 1), (0.35, 0.9), (0.25, 0.75))
    ink = colour(rng, (0.08, 0.16), (0.1, 0.7), (0.8, 1))
    cover = box(u, v, wide, tall)
    back = box(u - thick, v - thick, wide, tall)
    rgb = np.broadcast_to(cloth * 0.5, (*u.shape, 3))
    distance = np.minimum(cover, back)
    for step in np.linspace(0.85, 0.1, 7).tolist():
        pages = box(u - step * thick, v - step * thick, wide - 0.03, tall - 0.03)
        distance = np.minimum(distance, pages)
        rgb = lay(rgb, pages < 0, np.array([0.93, 0.89, 0.78], "f") * (0.7 + 0.3 * (round(step * 8) % 2)))
    sheen = 0.85 + 0.25 * (u * light[0] + v * light[1])
    page = np.broadcast_to(cloth, (*u.shape, 3))
    page = lay(page, np.abs(box(u - 0.06, v, wide - 0.16, tall - 0.1)) < 0.018, ink)
    for line in range(rng.integers(1, 4)):
        page = lay(page, box(u - 0.06, v + 0.42 - 0.2 * line, rng.uniform(0.15, wide - 0.25), 0.05) < 0, ink)
    page = lay(page, disc(u - 0.06, v - 0.35, rng.uniform(0.1, 0.2)) < 0, ink * 0.85)
    page = page * (1 - 0.45 * (np.abs(u + wide - 0.13) < 0.02) - 0.2 * (u < 0.13 - wide))[..., None]
    return distance, lay(rgb, cover < 0, page * sheen[..., None])


def leaf(u: Array, v: Array, light: Array, rng: Rng) -> Patch:
    """A leaf with a stem: toothed edge, midrib and side veins, one half turned to the light."""
    wide = rng.uniform(0.42, 0.6)
    bend = np.float32(rng.uniform(-0.25, 0.25)) * (v * v - 0.3)
    x = np.abs(u - bend)
    arc = (1 + wide * wide) / (2 * wide)
    blade = np.hypot(x + (arc - wide), v) - arc + 0.02 * np.sin(v * rng.uniform(25, 45))
    stem = box(u - bend, v - 1.0, 0.035, 0.22)
    hue = float(rng.choice([0.04, 0.1, 0.26, 0.3, 0.34]))
    flesh = colour(rng, (hue - 0.03, hue + 0.03), (0.6, 0.95), (0.4, 0.8))
    vein = flesh * 0.5 + 0.42
    veins = np.maximum(np.exp(-((x / 0.03) ** 2)), 0.6 * (np.sin((v + 0.8 * x) * 24) > 0.8))
    half = 1 + 0.2 * np.sign(u - bend) * np.sign(light[0]) + 0.15 * np.cos(x / wide * 3)
    rgb = lay(flesh * half[..., None], veins, vein)
    return np.minimum(blade, stem), lay(rgb, (blade > 0) & (stem < 0), flesh * 0.6)


def clock(u: Array, v: Array, light: Array, rng: Rng) -> Patch:
    """An alarm clock: two bells and two feet, a metal rim, a dial with twelve strokes and two hands."""
    rim = disc(u, v, 0.82)
    feet = box(np.abs(u) - 0.5, v - 0.8, 0.1, 0.2)
    bells = disc(np.abs(u) - 0.5, v + 0.75, 0.34)
    case = colour(rng, (0, 1), (0.4, 0.95), (0.4, 0.9))
    metal = colour(rng, (0.1, 0.14), (0.05, 0.7), (0.7, 0.95))
    gleam = 0.75 + 0.5 * (u * light[0] + v * light[1])
    rgb = np.broadcast_to(metal, (*u.shape, 3)) * (gleam * (0.85 + 0.5 * np.maximum(-bells, 0)))[..., None]
    rgb = lay(rgb, rim < 0, case * gleam[..., None])
    rgb = lay(rgb, np.abs(rim + 0.1) < 0.025, np.minimum(case * 1.3 + 0.15, 1))
    dial = disc(u, v, 0.64)
    rgb = lay(rgb, dial < 0, np.array([0.95, 0.93, 0.87], "f") * (0.8 + 0.25 * gleam)[..., None])
    hour = np.arctan2(u, v) * np.float32(6 / np.pi)
    strokes = (np.abs(hour - np.round(hour)) < 0.14) & (np.abs(dial + 0.12) < 0.06)
    rgb = lay(rgb, strokes, 0.12)
    for reach, width in ((0.36, 0.05), (0.5, 0.035)):
        x, y = rotate(u, v, rng.uniform(0, 2 * np.pi))
        hand = box(x, y + reach / 2, width, reach / 2 + 0.05)
        rgb = lay(rgb, hand < 0, 0.08)
    return np.minimum(np.minimum(rim, feet), bells), rgb


DRAW: dict[str, Drawing] = {
    "ball": ball, "book": book, "clock": clock, "leaf": leaf, "mug": mug,
}  # fmt: skip
CLASSES = tuple(DRAW)
