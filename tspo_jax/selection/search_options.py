"""How a video is searched for objects (T*), and the names of the objects; light, for the flags of commands."""

import dataclasses
from collections.abc import Sequence

SCHEDULES = ("mix", "random", "released")


@dataclasses.dataclass(frozen=True)
class SearchOptions:
    """How a video is searched.

    Attributes:
      schedule: of SCHEDULES.
      grid: rows and columns.
      share: of the candidates that may be looked at, at most 1000 frames and at least one grid.
      threshold: confidence above which a frame alone shows that a target was found.
      seed: of the random numbers.
      picture_size: side of the detector's square picture in pixels.
    """

    schedule: str = "mix"
    grid: tuple[int, int] = (4, 4)
    share: float = 0.1
    threshold: float = 0.6
    seed: int = 0
    picture_size: int = 768

    def __post_init__(self):
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule is {self.schedule!r}, not one of {', '.join(SCHEDULES)}")
        if len(self.grid) != 2 or min(self.grid) < 1 or max(self.grid) > 16:
            raise ValueError(f"grid is {self.grid}, not rows and columns from 1 to 16")
        if not 0 < self.share <= 1 and not (self.schedule == "released" and self.share > 0):
            raise ValueError(f"share is {self.share}; it must be above 0 and at most 1")
        if not 0 < self.threshold < 1:
            raise ValueError(f"threshold is {self.threshold}; it must be between 0 and 1")


def objects(targets: Sequence[str], cues: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names without white space around them, empty ones, repeated ones and cues that are targets."""
    targets, cues = ([text for text in map(str.strip, texts) if text] for texts in (targets, cues))
    return tuple(dict.fromkeys(targets)), tuple(cue for cue in dict.fromkeys(cues) if cue not in targets)
