"""The things and balls of the toy world: 32 nouns and 8 colours, each drawn by a few lines of Pillow.

Things are drawn on a 100 x 100 unit canvas in colours of their own and cut out like stickers (dark line,
white rim), so that they stay recognisable on every setting at 32-48 px.
"""

import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

_SUPERSAMPLE = 2  # sprites are drawn this many times larger than 100 px and reduced: smooth edges
_LINE = (45, 35, 50)

Color = tuple[int, int, int]
Point = tuple[float, float]


class Pen:
    """ImageDraw in units of a 100 x 100 canvas; every filled shape gets the same dark line around it."""

    def __init__(self):
        side = 100 * _SUPERSAMPLE
        self.image = Image.new("RGBA", (side, side), (0, 0, 0, 0))
        self._draw = ImageDraw.Draw(self.image)

    def polygon(self, points: Sequence[Point], fill: Color) -> None:
        scaled = [(x * _SUPERSAMPLE, y * _SUPERSAMPLE) for x, y in points]
        self._draw.polygon(scaled, fill=fill)
        self._draw.line([*scaled, *scaled[:2]], fill=_LINE, width=2 * _SUPERSAMPLE, joint="curve")

    def ellipse(self, x0: float, y0: float, x1: float, y1: float, fill: Color) -> None:
        box = [v * _SUPERSAMPLE for v in (x0, y0, x1, y1)]
        self._draw.ellipse(box, fill=fill, outline=_LINE, width=2 * _SUPERSAMPLE)

    def circle(self, x: float, y: float, radius: float, fill: Color) -> None:
        self.ellipse(x - radius, y - radius, x + radius, y + radius, fill)

    def box(self, x0: float, y0: float, x1: float, y1: float, fill: Color) -> None:
        self.polygon([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], fill)

    def stroke(self, points: Sequence[Point], width: float, fill: Color) -> None:
        """An open thick line with the dark line on both sides."""
        scaled = [(x * _SUPERSAMPLE, y * _SUPERSAMPLE) for x, y in points]
        for color, w in ((_LINE, width + 4), (fill, width)):
            self._draw.line(scaled, fill=color, width=round(w * _SUPERSAMPLE), joint="curve")


def _arc(x: float, y: float, radius: float, start: float, end: float) -> list[Point]:
    """Points of a circular arc; angles in degrees, 0 to the right, 90 down."""
    angles = np.radians(np.linspace(start, end, 25))
    return [(x + radius * math.cos(a), y + radius * math.sin(a)) for a in angles]


def _spikes(x: float, y: float, outer: float, inner: float, count: int) -> list[Point]:
    angles = [math.pi * i / count - math.pi / 2 for i in range(2 * count)]
    radii = [outer, inner] * count
    return [(x + r * math.cos(a), y + r * math.sin(a)) for a, r in zip(angles, radii, strict=True)]


def _sun(p: Pen) -> None:
    p.polygon(_spikes(50, 50, 47, 30, 12), (255, 120, 20))
    p.circle(50, 50, 26, (255, 200, 40))


def _moon(p: Pen) -> None:
    p.polygon(_arc(46, 50, 44, 55, 305) + _arc(64, 50, 38, 272, 88), (205, 215, 245))


def _tree(p: Pen) -> None:
    p.box(42, 55, 58, 97, (125, 75, 35))
    for x, y, r in ((30, 48, 22), (70, 48, 22), (50, 28, 25)):
        p.circle(x, y, r, (40, 140, 50))


def _house(p: Pen) -> None:
    p.box(15, 45, 85, 95, (245, 225, 170))
    p.polygon([(5, 48), (50, 6), (95, 48)], (190, 60, 45))
    p.box(24, 60, 46, 95, (120, 70, 40))
    p.box(57, 58, 76, 76, (120, 190, 240))


def _boat(p: Pen) -> None:
    p.box(47, 6, 53, 68, (120, 80, 50))
    p.polygon([(56, 8), (92, 60), (56, 60)], (250, 250, 245))
    p.polygon([(44, 20), (44, 60), (14, 60)], (230, 80, 70))
    p.polygon([(4, 67), (96, 67), (80, 94), (20, 94)], (150, 95, 50))


def _car(p: Pen) -> None:
    p.polygon([(22, 48), (34, 24), (68, 24), (82, 48)], (170, 225, 245))
    p.polygon([(3, 48), (97, 48), (97, 74), (3, 74)], (20, 165, 165))
    for x in (25, 75):
        p.circle(x, 76, 13, (60, 60, 65))
        p.circle(x, 76, 5, (220, 220, 220))


def _fish(p: Pen) -> None:
    p.polygon([(66, 50), (97, 22), (97, 78)], (240, 100, 20))
    p.ellipse(4, 24, 78, 76, (255, 150, 50))
    p.polygon([(40, 26), (52, 26), (56, 50), (52, 74), (40, 74), (44, 50)], (255, 245, 235))
    p.circle(20, 44, 5, (250, 250, 250))


def _bird(p: Pen) -> None:
    p.polygon([(70, 52), (98, 36), (96, 66)], (40, 85, 175))
    p.polygon([(6, 36), (24, 28), (24, 42)], (255, 180, 30))
    p.ellipse(22, 34, 82, 80, (75, 140, 230))
    p.circle(34, 34, 18, (75, 140, 230))
    p.circle(30, 30, 4, (250, 250, 250))
    p.polygon([(42, 52), (74, 50), (58, 74)], (170, 210, 255))
    p.stroke([(48, 80), (48, 95)], 2, (255, 180, 30))
    p.stroke([(60, 80), (60, 95)], 2, (255, 180, 30))


def _flower(p: Pen) -> None:
    p.stroke([(50, 50), (50, 97)], 5, (50, 150, 60))
    p.ellipse(52, 72, 80, 86, (60, 170, 70))
    for i in range(6):
        p.circle(50 + 21 * math.cos(i * math.pi / 3), 36 + 21 * math.sin(i * math.pi / 3), 14, (255, 130, 190))
    p.circle(50, 36, 12, (255, 215, 60))


def _star(p: Pen) -> None:
    p.polygon(_spikes(50, 54, 50, 20, 5), (255, 225, 50))


def _heart(p: Pen) -> None:
    t = np.linspace(0, 2 * math.pi, 60)
    x, y = 16 * np.sin(t) ** 3, 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    p.polygon(list(zip(50 + 2.8 * x, 46 - 2.8 * y, strict=True)), (225, 30, 60))


def _key(p: Pen) -> None:
    gold = (200, 150, 40)
    p.box(44, 46, 56, 97, gold)
    p.box(56, 70, 80, 79, gold)
    p.box(56, 86, 76, 95, gold)
    p.circle(50, 28, 26, gold)
    p.circle(50, 28, 12, (245, 245, 245))


def _cup(p: Pen) -> None:
    p.circle(76, 56, 19, (240, 240, 250))
    p.circle(76, 56, 9, (110, 120, 150))
    p.polygon([(10, 30), (74, 30), (68, 92), (16, 92)], (240, 240, 250))
    p.ellipse(10, 22, 74, 40, (110, 65, 30))
    p.box(15, 55, 69, 68, (60, 120, 220))


def _umbrella(p: Pen) -> None:
    p.stroke([(50, 10), (50, 84), (56, 92), (66, 90), (68, 82)], 4, (130, 90, 60))
    p.polygon(_arc(50, 54, 47, 180, 360) + [(80, 46), (65, 54), (50, 46), (35, 54), (20, 46)], (150, 60, 190))
    p.polygon(_arc(50, 54, 47, 240, 300) + [(65, 54), (50, 46), (35, 54)], (205, 140, 230))


def _kite(p: Pen) -> None:
    top, right, bottom, left, mid = (50, 3), (84, 32), (50, 72), (16, 32), (50, 32)
    for corners, fill in (
        ((top, right, mid), (250, 200, 40)),
        ((right, bottom, mid), (40, 170, 90)),
        ((bottom, left, mid), (235, 60, 60)),
        ((left, top, mid), (60, 120, 230)),
    ):
        p.polygon(corners, fill)
    p.stroke([(50, 72), (58, 82), (44, 88), (54, 97)], 3, (250, 120, 180))


def _mushroom(p: Pen) -> None:
    p.polygon([(38, 50), (62, 50), (68, 95), (32, 95)], (245, 230, 200))
    p.polygon(_arc(50, 55, 46, 180, 360), (200, 30, 35))
    for x, y, r in ((28, 42, 7), (50, 25, 8), (72, 42, 7)):
        p.circle(x, y, r, (255, 255, 255))


def _cactus(p: Pen) -> None:
    green = (70, 175, 110)
    p.stroke([(14, 34), (14, 62), (50, 62)], 14, green)
    p.stroke([(86, 24), (86, 52), (50, 52)], 14, green)
    p.polygon([(38, 18), (44, 6), (56, 6), (62, 18), (62, 84), (38, 84)], green)
    p.polygon([(26, 78), (74, 78), (68, 97), (32, 97)], (190, 95, 55))


def _rocket(p: Pen) -> None:
    p.polygon([(38, 78), (62, 78), (50, 99)], (255, 170, 30))
    p.polygon([(32, 52), (14, 84), (34, 78)], (215, 50, 50))
    p.polygon([(68, 52), (86, 84), (66, 78)], (215, 50, 50))
    p.polygon([(34, 78), (30, 44), (38, 20), (50, 3), (62, 20), (70, 44), (66, 78)], (215, 220, 230))
    p.polygon([(38, 20), (50, 3), (62, 20)], (215, 50, 50))
    p.circle(50, 42, 10, (70, 150, 235))


def _bell(p: Pen) -> None:
    p.circle(50, 86, 9, (150, 105, 30))
    p.polygon(
        [(30, 50), *_arc(50, 34, 22, 180, 360), (70, 50), (74, 66), (90, 82), (10, 82), (26, 66)],
        (240, 185, 50),
    )
    p.circle(50, 9, 6, (150, 105, 30))


def _clock(p: Pen) -> None:
    p.circle(50, 50, 46, (140, 85, 45))
    p.circle(50, 50, 35, (255, 252, 240))
    p.stroke([(50, 26), (50, 50), (67, 58)], 2, _LINE)
    for i in range(4):
        p.circle(50 + 29 * math.cos(i * math.pi / 2), 50 + 29 * math.sin(i * math.pi / 2), 2, _LINE)


def _ladder(p: Pen) -> None:
    wood = (205, 150, 85)
    for y in (16, 34, 52, 70, 88):
        p.stroke([(28, y), (72, y)], 6, wood)
    p.stroke([(26, 3), (26, 99)], 7, wood)
    p.stroke([(74, 3), (74, 99)], 7, wood)


def _drum(p: Pen) -> None:
    p.ellipse(10, 62, 90, 94, (60, 70, 170))
    p.box(10, 32, 90, 78, (60, 70, 170))
    p.stroke([(12, 42), (25, 80), (38, 44), (50, 82), (62, 44), (75, 80), (88, 42)], 2, (250, 215, 90))
    p.ellipse(10, 16, 90, 48, (250, 240, 220))
    p.stroke([(36, 32), (4, 4)], 3, (190, 120, 60))
    p.stroke([(64, 32), (96, 4)], 3, (190, 120, 60))


def _lamp(p: Pen) -> None:
    p.box(46, 48, 54, 88, (110, 110, 125))
    p.ellipse(24, 82, 76, 97, (110, 110, 125))
    p.polygon([(34, 6), (66, 6), (90, 52), (10, 52)], (255, 240, 150))


def _crown(p: Pen) -> None:
    p.polygon([(8, 82), (4, 24), (28, 50), (50, 12), (72, 50), (96, 24), (92, 82)], (255, 190, 30))
    p.box(8, 74, 92, 90, (215, 140, 20))
    for x, fill in ((26, (220, 40, 60)), (50, (50, 110, 230)), (74, (30, 170, 90))):
        p.circle(x, 66, 7, fill)


def _anchor(p: Pen) -> None:
    steel = (100, 120, 150)
    p.stroke(_arc(50, 50, 38, 15, 165), 9, steel)
    p.stroke([(50, 26), (50, 92)], 9, steel)
    p.stroke([(28, 38), (72, 38)], 7, steel)
    p.polygon([(3, 68), (14, 46), (27, 66)], steel)
    p.polygon([(97, 68), (86, 46), (73, 66)], steel)
    p.circle(50, 16, 12, steel)
    p.circle(50, 16, 5, (240, 240, 240))


def _book(p: Pen) -> None:
    p.polygon([(3, 26), (50, 34), (97, 26), (97, 84), (50, 92), (3, 84)], (130, 40, 60))
    p.polygon([(8, 18), (50, 28), (50, 84), (8, 76)], (250, 245, 225))
    p.polygon([(92, 18), (50, 28), (50, 84), (92, 76)], (250, 245, 225))
    for y in (36, 48, 60):
        p.stroke([(16, y - 2), (42, y + 4)], 1, _LINE)
        p.stroke([(84, y - 2), (58, y + 4)], 1, _LINE)


def _butterfly(p: Pen) -> None:
    for side in (-1, 1):
        p.polygon([(50, 44), (50 + side * 20, 10), (50 + side * 46, 12), (50 + side * 40, 48)], (250, 110, 40))
        p.polygon([(50, 52), (50 + side * 38, 52), (50 + side * 32, 86), (50 + side * 12, 82)], (120, 70, 200))
        p.circle(50 + side * 30, 28, 7, (255, 230, 120))
    p.ellipse(44, 24, 56, 86, (70, 50, 60))


def _cake(p: Pen) -> None:
    for x in (30, 50, 70):
        p.box(x - 3, 14, x + 3, 40, (120, 200, 240))
        p.circle(x, 10, 5, (255, 190, 40))
    p.box(10, 60, 90, 94, (150, 90, 60))
    p.polygon(
        [(10, 38), (90, 38), (90, 64), (80, 72), (70, 64), (50, 74), (30, 64), (20, 72), (10, 64)],
        (255, 190, 210),
    )


def _guitar(p: Pen) -> None:
    wood = (200, 110, 40)
    p.box(45, 4, 55, 52, (95, 60, 40))
    p.box(41, 2, 59, 15, (95, 60, 40))
    p.circle(50, 52, 18, wood)
    p.circle(50, 76, 23, wood)
    p.polygon([(37, 56), (63, 56), (66, 70), (34, 70)], wood)
    p.circle(50, 64, 8, (60, 40, 35))
    p.box(40, 82, 60, 87, (95, 60, 40))


def _hammer(p: Pen) -> None:
    p.box(43, 30, 57, 98, (190, 125, 65))
    p.polygon([(14, 8), (74, 8), (96, 30), (74, 34), (14, 34)], (150, 155, 165))
    p.box(6, 4, 22, 38, (110, 115, 125))


def _tent(p: Pen) -> None:
    p.polygon([(50, 8), (98, 92), (2, 92)], (150, 190, 60))
    p.polygon([(50, 8), (66, 92), (34, 92)], (90, 60, 50))
    p.polygon([(50, 8), (34, 92), (22, 92)], (240, 235, 200))


def _pencil(p: Pen) -> None:
    p.polygon([(80, 4), (96, 20), (86, 30), (70, 14)], (255, 150, 170))
    p.polygon([(70, 14), (86, 30), (30, 86), (14, 70)], (250, 205, 50))
    p.polygon([(14, 70), (30, 86), (4, 96)], (245, 220, 180))
    p.polygon([(8, 84), (16, 92), (4, 96)], (60, 60, 70))


_DRAW_THING: dict[str, Callable[[Pen], None]] = {
    draw.__name__[1:]: draw
    for draw in (
        *(
            _sun,
            _moon,
            _tree,
            _house,
            _boat,
            _car,
            _fish,
            _bird,
            _flower,
            _star,
            _heart,
            _key,
            _cup,
            _umbrella,
        ),
        *(_kite, _mushroom, _cactus, _rocket, _bell, _clock, _ladder, _drum, _lamp, _crown, _anchor, _book),
        *(_butterfly, _cake, _guitar, _hammer, _tent, _pencil),
    )
}
THINGS = tuple(_DRAW_THING)

BALLS: dict[str, Color] = {
    "red": (225, 25, 35),
    "green": (30, 165, 55),
    "blue": (30, 80, 235),
    "yellow": (255, 230, 20),
    "purple": (140, 40, 180),
    "orange": (255, 135, 10),
    "white": (252, 252, 252),
    "black": (12, 12, 14),
}


def _sticker(image: Image.Image, size: int) -> np.ndarray:
    """The drawing reduced to size px with a white rim: float32 [size, size, 4] as thing_sprite."""
    margin = 4 * _SUPERSAMPLE
    canvas = Image.new("RGBA", (image.width + 2 * margin, image.height + 2 * margin), (0, 0, 0, 0))
    canvas.paste(image, (margin, margin))
    alpha = canvas.getchannel("A").resize((100, 100)).filter(ImageFilter.MaxFilter(7)).resize(canvas.size)
    rim = Image.new("RGBA", canvas.size, (255, 255, 255, 0))
    rim.putalpha(alpha)
    small = Image.alpha_composite(rim, canvas).resize((size, size), Image.Resampling.BOX)
    sprite = np.asarray(small, np.float32)
    sprite[..., 3] /= 255
    sprite[..., :3] *= sprite[..., 3:]
    return sprite


@functools.cache
def thing_sprite(thing: str, size: int) -> np.ndarray:
    """The cut-out of a thing: float32 RGBA [size, size, 4].

    RGB is 0..255 and premultiplied by alpha, alpha is 0..1.
    """
    pen = Pen()
    _DRAW_THING[thing](pen)
    return _sticker(pen.image, size)


@functools.cache
def ball_sprite(color: str, size: int) -> np.ndarray:
    """The cut-out of a ball: as thing_sprite."""
    pen = Pen()
    pen.circle(50, 50, 49, BALLS[color])
    return _sticker(pen.image, size)
