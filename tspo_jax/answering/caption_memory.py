"""Captions of a video at several resolutions as one memory: a tree in which a finer caption stands under whatever
contains its period (VideoLucy, arXiv 2510.12422; the original nests some of them only, and loses the others).
"""

import bisect
import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence

from tspo_jax.answering.replies import Period

COARSE, FINE, ULTRA_FINE = "coarse", "fine", "ultra-fine"
LEVELS = (COARSE, FINE, ULTRA_FINE)
_EPSILON = 1e-6  # seconds


@dataclasses.dataclass(frozen=True)
class Clip:
    """A stretch of a video to be captioned: `times` are those of its frames, in seconds."""

    period: Period
    times: tuple[float, ...]


def cut(period: Period, length: float, fps: float) -> list[Clip]:
    """A period in pieces of `length` seconds at `fps` frames per second: frame k of a piece is k / fps after its start.

    As in the original, a last piece that is not full and has no more than `fps` frames (a second) is left out; but
    something is always left.
    """
    start, end = period
    clips = []
    for i in itertools.count():
        first = start + i * length
        if first >= end - _EPSILON and clips:
            break
        last = min(first + length, end)
        num_frames = max(math.ceil((last - first) * fps - _EPSILON), 1)
        times = tuple(first + k / fps for k in range(num_frames))
        is_whole = first + length <= end + _EPSILON
        if is_whole or len(times) > fps or not clips:
            clips.append(Clip((round(first, 1), min(round(last, 1), end)), times))
    return clips


@dataclasses.dataclass(frozen=True)
class Entry:
    """One caption. `step` counts the looks at the video: of two captions of a period the finer counts, then the later.

    Attributes:
      split: "whole" for a caption of what was asked for (or a window of it), "part" for one of its pieces.
    """

    period: Period
    text: str
    level: str
    step: int
    split: str = "whole"


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the memory as a prompt shows it; `depth` is that in the tree, `is_coarse` says that no closer look
    was taken."""

    depth: int
    period: Period
    text: str
    is_coarse: bool


class CaptionMemory:
    """All captions of one question's video.

    Attributes:
      windows: periods of the coarse captions, in order.
      kept: those of them that the prompts show; all unless the question was found to be about a few.
    """

    def __init__(self):
        self.entries: list[Entry] = []
        self.kept: set[Period] | None = None

    @property
    def windows(self) -> list[Period]:
        return [entry.period for entry in self.entries if entry.level == COARSE]

    def add(self, clips: Iterable[Clip], texts: Iterable[str | None], level: str, step: int, split: str) -> None:
        """Captions of clips; one that was not given (None) leaves no entry."""
        pairs = zip(clips, texts, strict=True)
        self.entries += [Entry(clip.period, text, level, step, split) for clip, text in pairs if text is not None]

    def keep_near(self, periods: Sequence[Period]) -> list[Period]:
        """Keeps the windows that overlap one of the periods, and their neighbours; all where none does.

        Returns the kept windows.
        """
        windows = self.windows
        near = {i for i, window in enumerate(windows) if any(_overlap(window, period) for period in periods)}
        near = {j for i in near for j in (i - 1, i, i + 1) if 0 <= j < len(windows)}
        self.kept = {windows[i] for i in near} or None
        return [window for window in windows if self.kept is None or window in self.kept]

    def rows(self, finest: str = ULTRA_FINE, all_windows: bool = False) -> list[Row]:
        """The memory in order of time, a finer caption under the smallest period that contains it.

        Args:
          finest: the finest level to show.
          all_windows: coarse captions of windows that were not kept, too.
        """
        shown: dict[Period, Entry] = {}
        for entry in self.entries:
            is_hidden = entry.level == COARSE and not all_windows and self.kept and entry.period not in self.kept
            if LEVELS.index(entry.level) > LEVELS.index(finest) or is_hidden:
                continue
            there = shown.get(entry.period)
            if there is None or _rank(entry) >= _rank(there):
                shown[entry.period] = entry
        by_time = sorted(shown, key=lambda p: (p[0], -p[1]))
        children: dict[Period | None, list[Period]] = {}
        for period in by_time:
            around = [other for other in by_time if other != period and _contains(other, period)]
            # Two periods may cross, and both contain it: it stands under the smaller one only.
            parent = min(around, key=lambda p: p[1] - p[0], default=None)
            children.setdefault(parent, []).append(period)

        def below(parent: Period | None, depth: int) -> Iterator[Row]:
            for period in children.get(parent, ()):
                yield Row(depth, period, shown[period].text, shown[period].level == COARSE)
                yield from below(period, depth + 1)

        return list(below(None, 0))


def _rank(entry: Entry) -> tuple[int, int]:
    return LEVELS.index(entry.level), entry.step


def _contains(outer: Period, inner: Period) -> bool:
    return outer[0] <= inner[0] + _EPSILON and inner[1] <= outer[1] + _EPSILON


def _overlap(a: Period, b: Period) -> bool:
    """Whether two periods share time; a moment counts where it lies in the other."""
    return min(a[1], b[1]) - max(a[0], b[0]) > 0 or (b[0] == b[1] and a[0] <= b[0] < a[1])


def shorten(
    rows: Sequence[Row], looked_at: Sequence[Period], fits: Callable[[Sequence[Row]], bool]
) -> tuple[list[Row], str | None]:
    """Rows whose prompt fits, none left out: captions are cut to a sentence, then to ever fewer words.

    Coarse captions far from the periods that were looked at are cut first, then the near ones, then finer ones.

    Returns: the rows, and what was done to them in words (None where they fit as they are). Where even lines without
    a caption do not fit, these are what comes back: the caller has to see.
    """
    rows = list(rows)
    if fits(rows):
        return rows, None

    def distance(row: Row) -> float:
        away = (max(row.period[0] - end, start - row.period[1], 0.0) for start, end in looked_at)
        return min(away, default=0.0)

    order = sorted(range(len(rows)), key=lambda i: (not rows[i].is_coarse, -distance(rows[i]), i))

    def cut_first(count: int, shortest: Callable[[str], str], rows: list[Row]) -> list[Row]:
        chosen = set(order[:count])
        return [dataclasses.replace(r, text=shortest(r.text)) if i in chosen else r for i, r in enumerate(rows)]

    for name, shortest in _CUTS.items():
        # A longer prompt does not fit where a shorter one does not, so the fewest cuts are found by halving.
        numbers = range(len(rows) + 1)
        count = bisect.bisect_left(numbers, True, key=lambda n, cut=shortest, rows=rows: fits(cut_first(n, cut, rows)))
        if count in numbers:
            note = f"{count} of {len(rows)} captions were cut to {name} to fit the writer"
            return cut_first(count, shortest, rows), note
        rows = cut_first(len(rows), shortest, rows)
    return rows, "the captions do not fit the writer, even cut to their times"


def first_sentence(text: str) -> str:
    return re.split(r"(?<=[.!?])\s+|\n", text.strip(), maxsplit=1)[0]


_CUTS: dict[str, Callable[[str], str]] = {
    "their first sentence": first_sentence,
    "12 words": lambda text: " ".join(text.split()[:12]),
    "4 words": lambda text: " ".join(text.split()[:4]),
    "their times": lambda text: "",
}
