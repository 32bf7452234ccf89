"""What the videos of the toy world show, and how a frame of them looks: pure functions of integer seeds.

A video is one setting and a row of short scenes. In an `event` a thing stands beside a ball; a `decoy` shows
a thing of this video once more, without a ball; a `filler` shows no thing. A thing has at most one event in a
video, so "the ball shown with the tree" and "what is shown right after the tree" have one answer.
"""

import bisect
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from tspo_jax.toy.settings import BACKGROUND_SIZE, SETTINGS, background
from tspo_jax.toy.sprites import BALLS, THINGS, ball_sprite, thing_sprite

FRAME_SIZE = 96
MIN_SCENE_S, MAX_SCENE_S = 1.5, 6.0  # at least 1.5 s, so that sampling at 1 fps meets every scene

# Disjoint seeds: "models" for the tiny CLIP and LLaVA-Video, "train" for the agent, "eval" is held out.
_SPLIT_START = {"models": 0, "train": 10_000_000, "eval": 20_000_000}
_SEEDS_PER_RUN = 10_000

# Sizes (px) and centres (x and y ranges) on a frame of 96 px. A composition that varies little is what lets tiny towers
# read the frames after minutes of training: a thing on the left, its ball on the right.
_EVENT_SIZES, _ALONE_SIZES, _BALL_SIZES = (48, 52, 56), (56, 60, 64), (24, 26, 28)
_THING_BESIDE_BALL, _THING_ALONE, _BALL = ((30, 35), (42, 54)), ((36, 60), (40, 56)), ((78, 80), (32, 64))


def video_seed(split: str, run: int, index: int) -> int:
    """The seed of video `index` of a split ("models", "train", "eval") in a run; no two are equal."""
    if split not in _SPLIT_START:
        raise ValueError(f"split {split!r} is not one of {sorted(_SPLIT_START)}")
    if not 0 <= run < 1000 or not 0 <= index < _SEEDS_PER_RUN:
        raise ValueError(f"run must be in [0, 1000) and index in [0, {_SEEDS_PER_RUN}), got {run} and {index}")
    return _SPLIT_START[split] + run * _SEEDS_PER_RUN + index


@dataclass(frozen=True)
class World:
    """How videos are drawn. Ranges are inclusive; durations in seconds."""

    duration: tuple[float, float] = (72.0, 234.0)  # drawn; the last scene adds up to 6 s
    frame_rates: tuple[Fraction, ...] = (Fraction(4), Fraction(24000, 5005), Fraction(5), Fraction(6))
    max_scene_share: float = 0.025  # of the video: two scenes, the longest evidence, last at most 5 %
    num_events: tuple[int, int] = (12, 16)
    num_lookups: int = 4
    num_relations: int = 2
    decoys: tuple[int, int] = (3, 6)  # per looked-up thing; more decoys mislead untrained CLIP more often
    filler_ball: float = 0.4  # probability that a filler shows a ball

    def __post_init__(self):
        busy = self.num_events[1] + self.num_lookups * self.decoys[1]
        if busy > 1 / self.max_scene_share:
            raise ValueError(f"num_events and decoys ask for up to {busy} scenes, more than the shortest video has")
        if self.num_events[0] < 2 + self.num_lookups + 2 * self.num_relations or self.num_events[1] > len(THINGS):
            raise ValueError(f"num_events {self.num_events} does not hold all questions within {len(THINGS)} things")
        for fps in self.frame_rates:
            if _longest_scene(self, self.duration[0], fps) < math.ceil(MIN_SCENE_S * fps):
                raise ValueError(
                    f"duration: {self.duration[0]} s is too short for scenes of {MIN_SCENE_S} s at {fps} fps"
                )


@dataclass(frozen=True)
class Look:
    """How one scene is pictured; positions are centres in px of the frame."""

    thing_size: int
    thing_xy: tuple[float, float]
    ball_size: int
    ball_xy: tuple[float, float]
    sway: tuple[float, float]  # amplitude of the motion, px
    period_s: float
    phase: float
    pan_xy: tuple[float, float]  # where the frame lies on the background
    brightness: float


@dataclass(frozen=True)
class Scene:
    kind: str  # "event", "decoy" or "filler"
    thing: str | None
    ball: str | None
    start: float  # s
    end: float  # s, exclusive
    look: Look


@dataclass(frozen=True)
class VideoPlan:
    """All that determines a video, and the things that its questions ask for."""

    seed: int
    fps: Fraction
    num_frames: int
    setting: str
    scenes: tuple[Scene, ...]
    lookup_things: tuple[str, ...]
    relation_things: tuple[str, ...]  # each shown once, and followed by the event of another thing

    @property
    def duration(self) -> float:
        """Seconds."""
        return float(self.num_frames / self.fps)

    def scene_index(self, time_s: float) -> int:
        """The index of the scene shown at time_s. Raises ValueError outside of the video."""
        if not 0 <= time_s < self.duration:
            raise ValueError(f"time {time_s} s is outside of the video of {self.duration} s")
        return bisect.bisect_right(self.scenes, time_s + 1e-6, key=lambda scene: scene.start) - 1

    def event(self, thing: str) -> int:
        """The index of the scene in which the thing stands beside a ball."""
        return next(i for i, scene in enumerate(self.scenes) if scene.kind == "event" and scene.thing == thing)


def caption(setting: str, thing: str | None, ball: str | None) -> str:
    """For example "a tree with a red ball in the desert", "a red ball in the desert", "the desert"."""
    shown = [noun for noun in (thing, ball and f"{ball} ball") if noun]
    if not shown:
        return SETTINGS[setting].split(" ", 1)[1]
    return " with ".join(f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}" for noun in shown) + f" {SETTINGS[setting]}"


# ---------------------------------------------------------------------------------------------------- plan


def make_video_plan(seed: int, world: World) -> VideoPlan:
    """Draws the video of a seed: see the module's text for what a video holds."""
    rng = np.random.default_rng(seed)
    fps = world.frame_rates[rng.integers(len(world.frame_rates))]
    setting = str(rng.choice(list(SETTINGS)))
    lengths = _scene_lengths(rng, world, fps)
    num_events = rng.integers(*world.num_events, endpoint=True)
    first, last, *middle = rng.permutation(THINGS)[:num_events].tolist()
    R, L = world.num_relations, world.num_lookups
    relation, followers, lookups = middle[:R], middle[R : 2 * R], middle[2 * R : 2 * R + L]

    units = [[("event", a), ("event", b)] for a, b in zip(relation, followers, strict=True)]
    units += [[("event", thing)] for thing in middle[2 * R :]]
    for thing in lookups:
        units += [[("decoy", thing)]] * int(rng.integers(*world.decoys, endpoint=True))
    units += [[("filler", None)]] * (len(lengths) - 2 - sum(map(len, units)))
    order = rng.permutation(len(units))
    rows = [("event", first), *(row for i in order for row in units[i]), ("event", last)]

    ends = np.cumsum(lengths)
    scenes = []
    for (kind, thing), length, end in zip(rows, lengths, ends.tolist(), strict=True):
        with_ball = kind == "event" or (kind == "filler" and rng.random() < world.filler_ball)
        ball = str(rng.choice(list(BALLS))) if with_ball else None
        look = draw_look(rng, thing, ball)
        scenes.append(Scene(kind, thing, ball, float((end - length) / fps), float(end / fps), look))
    return VideoPlan(seed, fps, int(ends[-1]), setting, tuple(scenes), tuple(lookups), tuple(relation))


def _longest_scene(world: World, duration: float, fps: Fraction) -> int:
    """In frames."""
    return min(math.floor(world.max_scene_share * duration * fps), math.floor(MAX_SCENE_S * fps))


def _scene_lengths(rng: np.random.Generator, world: World, fps: Fraction) -> list[int]:
    """In frames; their sum is at least the duration drawn, so none exceeds max_scene_share of it."""
    duration = rng.uniform(*world.duration)
    longest = _longest_scene(world, duration, fps)
    shortest = max(math.ceil(MIN_SCENE_S * fps), longest // 2)
    lengths = []
    while sum(lengths) < duration * fps:
        lengths.append(int(rng.integers(shortest, longest + 1)))
    return lengths


# ------------------------------------------------------------------------------------------------- picture


def draw_look(rng: np.random.Generator, thing: str | None, ball: str | None) -> Look:
    """A random way to show a thing and a ball side by side, or one of them; a thing alone is shown closer."""
    thing_x, thing_y = _THING_BESIDE_BALL if ball else _THING_ALONE
    return Look(
        thing_size=int(rng.choice(_EVENT_SIZES if ball else _ALONE_SIZES)),
        thing_xy=(float(rng.uniform(*thing_x)), float(rng.uniform(*thing_y))),
        ball_size=int(rng.choice(_BALL_SIZES)),
        ball_xy=(float(rng.uniform(*_BALL[0])), float(rng.uniform(*_BALL[1]))),
        sway=(float(rng.uniform(0, 1)), float(rng.uniform(0, 3))),
        period_s=float(rng.uniform(2, 5)),
        phase=float(rng.uniform(0, 2 * math.pi)),
        pan_xy=(float(rng.uniform(4, 28)), float(rng.uniform(4, 28))),
        brightness=float(rng.uniform(0.82, 1.08)),
    )


def render_frame(plan: VideoPlan, time_s: float) -> np.ndarray:
    """The frame that the video shows at time_s: uint8 [96, 96, 3]. Raises ValueError outside of the video."""
    scene = plan.scenes[plan.scene_index(time_s)]
    number = math.floor(time_s * float(plan.fps) + 1e-6)
    frame_rng = np.random.default_rng((plan.seed, number))
    return _paint(plan.setting, scene.thing, scene.ball, scene.look, number / float(plan.fps), frame_rng)


def render_scene(rng: np.random.Generator, setting: str, thing: str | None, ball: str | None) -> np.ndarray:
    """One frame with the given contents and a random look: uint8 [96, 96, 3]."""
    return _paint(setting, thing, ball, draw_look(rng, thing, ball), 0.0, rng)


def render_with_boxes(
    rng: np.random.Generator, setting: str, thing: str | None, ball: str | None
) -> tuple[np.ndarray, dict[str, tuple[float, float, float, float]]]:
    """As `render_scene`, with the box (centre x, centre y, width, height), relative to the frame, of "tree" and of
    "red ball"."""
    look = draw_look(rng, thing, ball)
    dx, dy = _motion(look, 0.0)
    boxes = {}
    if thing:
        boxes[thing] = (look.thing_xy[0] + dx, look.thing_xy[1] + dy, look.thing_size, look.thing_size)
    if ball:
        boxes[f"{ball} ball"] = (look.ball_xy[0] + dx, look.ball_xy[1] - dy, look.ball_size, look.ball_size)
    frame = _paint(setting, thing, ball, look, 0.0, rng)
    return frame, {name: tuple(value / FRAME_SIZE for value in box) for name, box in boxes.items()}


def _motion(look: Look, time_s: float) -> tuple[float, float]:
    """Px to the right and down that things are from their places."""
    angle = 2 * math.pi * time_s / look.period_s + look.phase
    return look.sway[0] * math.sin(angle), look.sway[1] * math.cos(angle)


def _paint(
    setting: str, thing: str | None, ball: str | None, look: Look, time_s: float, rng: np.random.Generator
) -> np.ndarray:
    """Setting, thing and ball at a moment of their motion; light and sensor noise are drawn from rng."""
    dx, dy = _motion(look, time_s)
    x, y = round(look.pan_xy[0] + dx), round(look.pan_xy[1] + dy)
    frame = background(setting)[y : y + FRAME_SIZE, x : x + FRAME_SIZE].copy()
    if thing:
        _paste(frame, *_layers(thing_sprite, thing, look.thing_size), look.thing_xy[0] + dx, look.thing_xy[1] + dy)
    if ball:
        _paste(frame, *_layers(ball_sprite, ball, look.ball_size), look.ball_xy[0] + dx, look.ball_xy[1] - dy)
    frame *= look.brightness * (1 + 0.04 * rng.uniform(-1, 1))
    noise_y, noise_x = rng.integers(0, BACKGROUND_SIZE, 2)
    frame += _sensor_noise()[noise_y : noise_y + FRAME_SIZE, noise_x : noise_x + FRAME_SIZE]
    return np.clip(frame, 0, 255, out=frame).astype(np.uint8)


@functools.cache
def _layers(draw: Callable[[str, int], np.ndarray], name: str, size: int) -> tuple[np.ndarray, np.ndarray]:
    """A premultiplied sprite's colours, and how much of what lies below it shows through, each [height, width, 3]."""
    sprite = draw(name, size)
    return sprite[..., :3].copy(), np.repeat(1 - sprite[..., 3:], 3, axis=-1)


def _paste(frame: np.ndarray, colours: np.ndarray, through: np.ndarray, center_x: float, center_y: float) -> None:
    """Lays a sprite over the frame, in place; what lies outside of the frame is cut off."""
    height, width = colours.shape[:2]
    x, y = round(center_x - width / 2), round(center_y - height / 2)
    top, left = max(0, -y), max(0, -x)
    inside = slice(top, FRAME_SIZE - y), slice(left, FRAME_SIZE - x)
    region = frame[y + top : y + height, x + left : x + width]
    region *= through[inside]
    region += colours[inside]


@functools.cache
def _sensor_noise() -> np.ndarray:
    """One sheet of noise, of which every frame takes a piece: fresh noise would double the rendering time."""
    side = BACKGROUND_SIZE + FRAME_SIZE
    return np.random.default_rng(0).normal(0, 3, (side, side, 3)).astype(np.float32)
