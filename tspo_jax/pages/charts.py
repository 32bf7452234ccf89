"""Where the lines of a chart go: numbers -> places in an SVG picture, which charts.html draws."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from tspo_jax.pages.contact_sheet import clock

_MAX_POINTS = 2000  # of a line: more cannot be seen


@dataclass(frozen=True)
class Curve:
    """A metric over the steps: its name, colour (CSS class), steps [n] and values [n]."""

    name: str
    colour: str
    steps: Sequence[float]
    values: Sequence[float]


@dataclass(frozen=True)
class Line:
    """A line of a chart: CSS classes, and "x,y x,y .." in pixels."""

    style: str
    points: str


@dataclass(frozen=True)
class Label:
    """A text at a place of an axis: pixels, the text, and which end of it is there (`text-anchor`)."""

    place: float
    text: str
    anchor: str


@dataclass(frozen=True)
class Chart:
    """What charts.html draws.

    Attributes:
      width, height: pixels; left, right, bottom: edges of the area of the lines.
      rows: labels of the y axis, each with a line across; columns: labels of the x axis.
      keys: (colour, name) of the legend.
      spans: shaded (start, width, title) along x.
      marks: (colour, x, y, title) of the small bars below.
      duration: what the x axis stands for, from 0, in seconds; 0 where it is not time.
    """

    title: str
    width: int
    height: int
    left: int
    right: int
    bottom: int
    lines: Sequence[Line]
    keys: Sequence[tuple[str, str]]
    columns: Sequence[Label]
    rows: Sequence[Label] = ()
    spans: Sequence[tuple[float, float, str]] = ()
    marks: Sequence[tuple[str, float, float, str]] = ()
    duration: float = 0.0


def smooth(values: Sequence[float]) -> np.ndarray:
    """Moving average [n] over a twelfth of the curve (at least 5 values), centred, so that it does not lag."""
    values = np.asarray(values, float)
    half = max(2, len(values) // 24)
    total = np.concatenate([[0.0], np.cumsum(values)])
    place = np.arange(len(values))
    start, stop = np.maximum(place - half, 0), np.minimum(place + half + 1, len(values))
    return (total[stop] - total[start]) / (stop - start)


def over_steps(title: str, curves: Sequence[Curve], width: int = 420, height: int = 210) -> Chart:
    """Curves over steps, raw and smoothed, several with a legend; the axis of what stays in [0, 1] goes from 0 to 1."""
    left, right, top, bottom = 44, 10, 10, 24
    steps = np.concatenate([np.asarray(c.steps, float) for c in curves])
    values = np.concatenate([np.asarray(c.values, float) for c in curves])
    is_share = values.min() >= 0 and values.max() <= 1
    marked = [0, 0.25, 0.5, 0.75, 1] if is_share else ticks(float(values.min()), float(values.max()))
    x = _Scale(steps.min(), max(steps.max(), steps.min() + 1), left, width - right)
    y = _Scale(marked[0], marked[-1], height - bottom, top)
    lines = [
        Line(f"{kind} {curve.colour}", _points(curve.steps, values, x, y))
        for curve in curves
        for values, kind in ((curve.values, "raw"), (smooth(curve.values), "smooth"))
    ]
    keys = [(c.colour, c.name) for c in curves] if len(curves) > 1 else []
    columns = [Label(x(s), f"step {s:g}", anchor) for s, anchor in ((steps.min(), "start"), (steps.max(), "end"))]
    rows = [Label(y(t), f"{t:g}", "end") for t in marked]
    return Chart(title, width, height, left, width - right, height - bottom, lines, keys, columns, rows)


def over_time(
    title: str,
    times: np.ndarray,
    duration: float,
    curves: Sequence[tuple[str, str, np.ndarray]],
    picks: Sequence[tuple[str, str, Sequence[float]]],
    evidence: Sequence[tuple[float, float]] = (),
    width: int = 880,
    height: int = 190,
) -> Chart:
    """Scores over a video, the evidence shaded, below them a row of bars for each method.

    Args:
      title: of the chart, for those who cannot see it.
      times: of the candidates, seconds [T].
      duration: of the video, seconds.
      curves: (name, colour, scores [T]); each is shown relative to its mean.
      picks: (method's name, colour, seconds of its frames [K]).
      evidence: spans in seconds.
    """
    left, right, top, row_height = 10, 10, 8, 13
    bottom = 22 + row_height * len(picks)
    x = _Scale(0, max(duration, 1e-9), left, width - right)
    centred = [np.asarray(scores, float) - np.mean(scores) for _, _, scores in curves]
    low, high = min(scores.min() for scores in centred), max(scores.max() for scores in centred)
    y = _Scale(low, max(high, low + 1e-9), height - bottom, top)
    lines = [
        Line(f"score {colour}", _points(*_thinned(times, scores), x, y))
        for (_, colour, _), scores in zip(curves, centred, strict=True)
    ]
    marks = [
        (colour, x(seconds), height - bottom + 4 + row_height * (row + 0.5), f"{name} {clock(seconds)}")
        for row, (name, colour, seconds_of) in enumerate(picks)
        for seconds in seconds_of
    ]
    anchors = {0: "start", 1: "end"}
    columns = [
        Label(x(share * duration), clock(share * duration)[:-2], anchors.get(share, "middle"))
        for share in (0, 0.25, 0.5, 0.75, 1)
    ]
    keys = [(colour, name) for name, colour, _ in (*curves, *picks)]
    spans = [(x(a), max(x(b) - x(a), 1.5), f"evidence {clock(a)} – {clock(b)}") for a, b in evidence]
    edges = (left, width - right, height - bottom)
    return Chart(title, width, height, *edges, lines, keys, columns, (), spans, marks, duration)


@dataclass(frozen=True)
class _Scale:
    """Maps [low, high] to [start, end] pixels."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (float(value) - self.low) / (self.high - self.low) * (self.end - self.start)


def _points(xs: Iterable[float], ys: Iterable[float], x: _Scale, y: _Scale) -> str:
    return " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in zip(xs, ys, strict=True))


def _thinned(xs: np.ndarray, ys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of a line that is longer than can be seen, the lowest and the highest point of each of many short pieces."""
    if len(ys) <= _MAX_POINTS:
        return np.asarray(xs), ys
    kept = [
        piece[i]
        for piece in np.array_split(np.arange(len(ys)), _MAX_POINTS // 2)
        for i in sorted({int(np.argmin(ys[piece])), int(np.argmax(ys[piece]))})
    ]
    return np.asarray(xs)[kept], ys[kept]


def ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers around [low, high]."""
    span = high - low or abs(high) or 1.0
    unit = 10 ** math.floor(math.log10(span / 2))
    step = next(unit * m for m in (1, 2, 5, 10) if span / (unit * m) <= 4)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(step * i, 12) for i in range(first, max(last, first + 1) + 1)]
