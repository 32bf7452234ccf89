"""The 12 settings of the toy world: backgrounds of their own colours and texture, drawn with Pillow."""

import functools
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

BACKGROUND_SIZE = 128  # px; larger than a frame, so that a scene can pan over it

Color = tuple[int, int, int]


def _ground(sky: Color, ground: Color, horizon: int = 64) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", (BACKGROUND_SIZE, BACKGROUND_SIZE), sky)
    draw = ImageDraw.Draw(image)
    draw.rectangle([0, horizon, BACKGROUND_SIZE, BACKGROUND_SIZE], fill=ground)
    return image, draw


def _desert(rng: np.random.Generator) -> Image.Image:
    image, draw = _ground((255, 225, 160), (225, 175, 95), 48)
    for y in range(54, 150, 14):
        x = int(rng.integers(-20, 20))
        draw.arc([x - 20, y, x + 80, y + 30], 180, 360, fill=(195, 140, 70), width=3)
        draw.arc([x + 60, y + 4, x + 160, y + 34], 180, 360, fill=(195, 140, 70), width=3)
    return image


def _forest(rng: np.random.Generator) -> Image.Image:
    image, draw = _ground((25, 85, 45), (60, 60, 30), 100)
    for x in range(4, 128, 18):
        draw.rectangle([x, 0, x + 6, 110], fill=(70, 50, 30))
    for x, y in rng.integers(0, 128, (70, 2)):
        draw.ellipse([x - 6, y // 2 - 6, x + 6, y // 2 + 6], fill=(20, 110 + int(x) // 4, 40))
    return image


def _sea(rng: np.random.Generator) -> Image.Image:
    image, draw = _ground((150, 210, 250), (20, 90, 190), 36)
    for y in range(42, 128, 9):
        for x in range(int(rng.integers(-16, 0)), 128, 22):
            draw.arc([x, y, x + 12, y + 8], 200, 340, fill=(130, 190, 250), width=2)
    return image


def _snow(rng: np.random.Generator) -> Image.Image:
    image, draw = _ground((190, 205, 225), (240, 245, 252), 50)
    draw.polygon([(0, 50), (30, 14), (62, 50)], fill=(160, 175, 205))
    draw.polygon([(54, 50), (92, 20), (128, 50)], fill=(170, 185, 212))
    for x, y in rng.integers(0, 128, (60, 2)):
        draw.ellipse([x - 2, y - 2, x + 2, y + 2], fill=(255, 255, 255))
    return image


def _city(rng: np.random.Generator) -> Image.Image:
    image, draw = _ground((15, 15, 45), (30, 30, 40), 112)
    for x in range(0, 128, 22):
        top = int(rng.integers(10, 50))
        draw.rectangle([x, top, x + 18, 112], fill=(45, 48, 75))
        for wy in range(top + 4, 108, 9):
            for wx in (x + 3, x + 11):
                if rng.random() < 0.6:
                    draw.rectangle([wx, wy, wx + 4, wy + 4], fill=(250, 215, 110))
    return image


def _meadow(rng: np.random.Generator) -> Image.Image:
    image, draw = _ground((170, 225, 255), (130, 210, 70), 40)
    for x, y in rng.integers(0, 128, (90, 2)):
        y = 42 + y * 2 // 3
        draw.line([x, y, x + 2, y - 6], fill=(80, 165, 40), width=2)
    return image


def _cave(rng: np.random.Generator) -> Image.Image:
    image, draw = _ground((70, 62, 60), (95, 82, 74), 96)
    for x in range(-4, 128, 15):
        draw.polygon([(x, 0), (x + 14, 0), (x + 7, int(rng.integers(24, 60)))], fill=(115, 100, 92))
        draw.polygon([(x + 6, 128), (x + 20, 128), (x + 13, int(rng.integers(84, 110)))], fill=(50, 44, 44))
    return image


def _volcano(rng: np.random.Generator) -> Image.Image:
    image, draw = _ground((110, 25, 20), (45, 20, 22), 70)
    draw.polygon([(4, 128), (50, 24), (78, 24), (124, 128)], fill=(70, 32, 30))
    for x in (52, 62, 72):
        points = [(x + (x - 62) * i // 2 + int(rng.integers(-5, 6)), 24 + 18 * i) for i in range(7)]
        draw.line(points, fill=(255, 110, 20), width=5)
    return image


def _lavender(rng: np.random.Generator) -> Image.Image:
    image, draw = _ground((235, 215, 250), (120, 150, 80), 36)
    for x in range(-260, 400, 36):
        draw.polygon(
            [(64 + (x - 64) // 6, 36), (x, 128), (x + 22, 128), (68 + (x - 64) // 6, 36)],
            fill=(165, 115, 215),
        )
    return image


def _kitchen(rng: np.random.Generator) -> Image.Image:
    image, draw = _ground((255, 245, 200), (255, 245, 200))
    for y in range(8):
        for x in range(y % 2, 8, 2):
            draw.rectangle([16 * x, 16 * y, 16 * x + 15, 16 * y + 15], fill=(120, 205, 195))
    return image


def _alley(rng: np.random.Generator) -> Image.Image:
    image, draw = _ground((205, 190, 180), (205, 190, 180))
    for row, y in enumerate(range(0, 128, 11)):
        for x in range(-12 * (row % 2), 128, 24):
            shade = int(rng.integers(-12, 12))
            draw.rectangle([x, y, x + 21, y + 8], fill=(165 + shade, 80 + shade, 60 + shade))
    return image


def _circus(rng: np.random.Generator) -> Image.Image:
    image, draw = _ground((255, 205, 215), (255, 205, 215))
    for x in range(0, 128, 32):
        draw.rectangle([x, 0, x + 15, 128], fill=(235, 90, 145))
    return image


_DRAW_SETTING: dict[str, tuple[str, Callable[[np.random.Generator], Image.Image]]] = {
    "desert": ("in the desert", _desert),
    "forest": ("in the forest", _forest),
    "sea": ("on the sea", _sea),
    "snow": ("in the snow", _snow),
    "city": ("in the city", _city),
    "meadow": ("on the meadow", _meadow),
    "cave": ("in the cave", _cave),
    "volcano": ("on the volcano", _volcano),
    "lavender": ("in the lavender", _lavender),
    "kitchen": ("in the kitchen", _kitchen),
    "alley": ("in the alley", _alley),
    "circus": ("in the circus", _circus),
}
SETTINGS: dict[str, str] = {name: place for name, (place, _) in _DRAW_SETTING.items()}  # name -> "in the desert"


@functools.cache
def background(setting: str) -> np.ndarray:
    """The empty setting: float32 [BACKGROUND_SIZE, BACKGROUND_SIZE, 3], 0..255."""
    return np.asarray(_DRAW_SETTING[setting][1](np.random.default_rng(0)), np.float32)
