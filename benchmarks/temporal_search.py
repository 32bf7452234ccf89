"""How many frames T* looks at until it sees what it searches, by schedule, on scripted detections: no model, no video.

    python -m benchmarks.temporal_search [--seeds=200] [--schedules=mix] [--output=F]

The set-up of the reference study: an hour at one frame per second, a needle of 10 seconds somewhere in it, false
positives (confidence .01 to .26) in a share of all frames, and, where there is a cue, a second object that is seen
within so many seconds of the needle. Searches end with the needle found, or after 1008 frames. Every schedule meets the
same videos. One line per setting: mean frames (a search that fails counts with its 1008) with a 95 % interval over
seeds, relative to `random` with an interval of the difference, and the share not found.
"""

from collections.abc import Sequence

import numpy as np
from absl import flags

from tspo_jax.command_line import entry_point
from tspo_jax.evaluation.statistics import clustered_mean, paired_difference
from tspo_jax.models.owlvit import Detections
from tspo_jax.selection.search_options import SCHEDULES, SearchOptions
from tspo_jax.selection.tstar import search

SECONDS, NEEDLE, LIMIT = 3600, 10, 1008
NOISE = {"in every frame": 1.0, "in 30 % of the frames": 0.3, "none": 0.0}
CUES = {"no cue": None, "cue within 60 s": 60, "cue within 300 s": 300}
TARGET, CUE, NUM_TEXTS = 0, 1, 3
SIDE = 64  # pixels of a grid; a frame's colour tells its second


class ScriptedVideo:
    """A video and what a detector says of it, a function of the seed."""

    def __init__(self, seed: int, noise: float, cue_reach: int | None):
        rng = np.random.default_rng(seed)
        start = int(rng.integers(SECONDS - NEEDLE))
        seconds = np.arange(SECONDS)
        distance = np.maximum(start - seconds, seconds - (start + NEEDLE - 1)).clip(0)
        self.scores = np.zeros((SECONDS, NUM_TEXTS))
        is_false = rng.random((SECONDS, 2)) < noise
        self.scores[:, :2] = np.where(is_false, 0.01 + 0.25 * rng.random((SECONDS, 2)), 0)
        sure = 0.6 + 0.35 * rng.random((SECONDS, 2))
        self.scores[:, TARGET] = np.where(distance == 0, sure[:, TARGET], self.scores[:, TARGET])
        if cue_reach is not None:
            self.scores[:, CUE] = np.where(distance <= cue_reach, sure[:, CUE], self.scores[:, CUE])

    def look(self, seconds):
        return [np.full((4, 4, 3), (s % 256, s // 256, 255), np.uint8) for s in seconds]

    def detector(self, grid):
        def detect(pictures):
            return [self._detections(picture, *grid) for picture in pictures]

        return detect

    def _detections(self, picture, rows, columns):
        if (picture == picture[0, 0]).all():  # a frame alone
            rows = columns = 1
        height, width = picture.shape[0] // rows, picture.shape[1] // columns
        middles = picture[height // 2 :: height, width // 2 :: width].reshape(-1, 3).astype(int)
        cells = np.flatnonzero(middles[:, 2])
        x, y = cells % columns * width, cells // columns * height
        seconds = middles[cells, 0] + 256 * middles[cells, 1]
        return Detections(np.stack([x, y, x + width, y + height], axis=-1), self.scores[seconds])


def frames_until_found(schedule: str, seed: int, noise: float, cue_reach: int | None) -> tuple[int, bool]:
    """Frames that were looked at, and whether the needle was found."""
    options = SearchOptions(schedule, share=LIMIT / SECONDS, threshold=0.6, seed=seed, picture_size=SIDE)
    video = ScriptedVideo(seed, noise, cue_reach)
    cues = ["cue"] if cue_reach is not None else []
    texts = [TARGET, *([CUE] if cues else []), NUM_TEXTS - 1]
    video.scores = video.scores[:, texts]
    found = search(SECONDS, video.look, video.detector(options.grid), ["target"], cues, 8, options)
    return found.num_frames, not found.rounds[-1].remaining


def measure(num_seeds: int, schedules: Sequence[str]) -> list[dict]:
    rows = []
    for noise_name, noise in NOISE.items():
        for cue_name, reach in CUES.items():
            frames = {}
            for schedule in ("random", *(s for s in schedules if s != "random")):
                results = [frames_until_found(schedule, seed, noise, reach) for seed in range(num_seeds)]
                frames[schedule] = np.array([count if is_found else LIMIT for count, is_found in results], float)
                seeds = list(map(str, range(num_seeds)))
                mean = clustered_mean(frames[schedule], seeds)
                difference = paired_difference(frames[schedule], frames["random"], seeds)
                base = frames["random"].mean()
                rows.append(
                    {
                        "false_positives": noise_name,
                        "cue": cue_name,
                        "schedule": schedule,
                        "frames": round(mean.value, 1),
                        "interval_95": _rounded([mean.low, mean.high], 1),
                        "relative_to_random": round(mean.value / base, 3),
                        "relative_interval_95": _rounded(
                            [None if d is None else 1 + d / base for d in (difference.low, difference.high)], 3
                        ),
                        "not_found": round(1 - float(np.mean([is_found for _, is_found in results])), 3),
                    }
                )
    return rows


def _rounded(numbers: Sequence[float | None], digits: int) -> list[float | None]:
    """An interval, which few seeds do not give."""
    return [None if number is None else round(number, digits) for number in numbers]


def main() -> None:
    args = flags.FLAGS
    entry_point.write_result({"seeds": args.seeds, "settings": measure(args.seeds, args.schedules)}, args.output)


if __name__ == "__main__":
    flags.DEFINE_integer("seeds", 200, "Videos per setting.", lower_bound=2)
    flags.DEFINE_multi_enum("schedules", ["random", "mix"], SCHEDULES, "What is compared with random.")
    flags.DEFINE_string("output", "", "JSON file to write; stdout if empty.")
    entry_point.run(main)
