"""How well chosen frames meet annotated moments, and how they spread over the video: no video, no model needed.

Distances are in seconds, so frame numbers need the right clock. The published index files hold frame numbers only;
`Clock` recovers the frame rate from them. A hit rate at a tolerance says, over the questions,

  any   at least one annotated moment has a chosen frame within the tolerance,
  all   every annotated moment has one,
  frac  the mean share of moments that have one: the recall of LV-Haystack's metrics,
  precision  the mean share of chosen frames that have a moment within the tolerance, and f1, of both, by question.

`annd_s` are the mean distances of a chosen frame to the nearest moment and of a moment to the nearest chosen frame.

With a frame store, `ssim_precision` and `ssim_recall` say in LV-Haystack's way how alike the pictures of chosen frames
and of annotated moments are, each by its best partner, and `ssim_f1` is that of both means.

They stand beside two references: as many frames evenly spaced, and the frames chosen for the next question about the
same video. A selection that follows the question beats the second one.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track

from tspo_jax.data.frame_store import FrameStore
from tspo_jax.evaluation import benchmarks, frame_indices, statistics
from tspo_jax.evaluation.benchmarks import BenchmarkError, Item
from tspo_jax.evaluation.temporal_search_metrics import agreement, f1, ssim_agreement, ssim_matrix

CANDIDATE_CAP = 5000  # the published MLVU run thinned videos out to so many candidates
HIGHEST_RATE = 120  # a greater divisor is that of too few frame numbers
FRAME_RATES = (24000 / 1001, 24, 25, 30000 / 1001, 30, 50, 60000 / 1001, 60)
TIME_BASES = ("capped", "step")


@dataclasses.dataclass(frozen=True)
class Clock:
    """What turns a video's frame numbers into seconds.

    Attributes:
      fps: frames per second.
      spacing: seconds between neighbouring candidates.
      end: times are cut here (seconds).
    """

    fps: float
    spacing: float = 1.0
    end: float = math.inf

    @classmethod
    def recover(cls, frames: Iterable[int], duration: float | None, time_base: str = "capped") -> "Clock":
        """The clock of a video from all the frame numbers that were chosen in it.

        Candidates are taken once a second, every round(fps)-th frame, so fps is about the greatest common divisor.
        Of a video of more than 5,000 s the published run took np.linspace(0, N - 1, 5000) of its N frames instead; the
        divisor is then 1, and the usual frame rate whose grid holds all frames is the right one.

        Args:
          frames: at least one number above 0.
          duration: seconds, or None if unknown.
          time_base: "capped" as described; "step" takes the divisor whatever it is and cuts times at the duration, as
            the published analysis of the MLVU selections did.

        Raises: ValueError where no frame rate fits.
        """
        numbers = np.unique(np.asarray(list(frames), np.int64))
        step = int(np.gcd.reduce(numbers))
        if time_base == "step":
            return cls(step, end=math.inf if duration is None else duration)
        if 0 < step <= HIGHEST_RATE and (step > 1 if duration is None else numbers[-1] / step <= 1.05 * duration):
            return cls(step)
        if duration is not None and duration > CANDIDATE_CAP:
            for fps in FRAME_RATES:
                count = round(duration * fps)
                for num_frames in (count - 1, count, count + 1):
                    grid = np.linspace(0, num_frames - 1, CANDIDATE_CAP, dtype=int)
                    if np.isin(numbers, grid).all():
                        return cls(fps, duration / CANDIDATE_CAP)
        video = "" if duration is None else f" of a video of {duration:g} s"
        raise ValueError(
            f"frame numbers up to {numbers[-1]} do not tell the frame rate{video}: some lie behind its end, or they "
            "are too few; add 'fps' to each row"
        )

    def seconds(self, frames: Sequence[float]) -> np.ndarray:
        return np.minimum(np.asarray(frames, float) / self.fps, self.end)


# ---- one question ----------------------------------------------------------------------------------------


def hits(times: np.ndarray, moments: Sequence[tuple[float, float]], tolerances: Sequence[float]) -> dict[str, float]:
    """Hit rates and distances of one question.

    Args:
      times: seconds of the chosen frames [K].
      moments: annotated spans [M] of (start, end) in seconds; a frame inside a span is at distance 0.
      tolerances: seconds.

    Returns: any@t, all@t and frac@t in [0, 1] and `distance`, the mean over moments to the nearest frame in seconds;
      nothing without moments.
    """
    if not len(moments):
        return {}
    start, end = np.asarray(moments, float).T[..., None]
    distance = np.maximum(np.maximum(start - times, times - end), 0).min(axis=1)
    rows = {"distance": float(distance.mean())}
    for tolerance in tolerances:
        hit = distance <= tolerance
        rows |= {f"any@{tolerance}": hit.any(), f"all@{tolerance}": hit.all(), f"frac@{tolerance}": hit.mean()}
    return {name: float(value) for name, value in rows.items()}


def near(times: np.ndarray, moments: Sequence[tuple[float, float]], tolerances: Sequence[float]) -> dict[str, float]:
    """`hits`, and the precision and F1 of temporal_search_metrics.agreement (whose recall is `frac`)."""
    return agreement(times, moments, tolerances) | hits(times, moments, tolerances)


def likeness(store: FrameStore, item: Item, times: np.ndarray) -> dict[str, float]:
    """`ssim_agreement` of the stored pictures that are nearest to the chosen times and to the middles of the moments;
    nothing without moments."""
    if not len(item.moments):
        return {}
    timestamps = store.video(item.video).timestamps

    def pictures(seconds: Sequence[float]) -> list[np.ndarray]:
        nearest = np.abs(timestamps - np.asarray(seconds)[:, None]).argmin(axis=1)
        which, places = np.unique(nearest, return_inverse=True)
        shown = list(store.frames(item.video, which))
        return [shown[place] for place in places]

    return ssim_agreement(ssim_matrix(pictures(np.mean(item.moments, axis=1)), pictures(times)))


def spread(times: np.ndarray, duration: float | None, spacing: float = 1.0) -> dict[str, float]:
    """How frames lie in their video.

    Args:
      times: seconds, ascending [K].
      duration: seconds; without it the shares of the video are left out.
      spacing: seconds between neighbouring candidates.

    Returns:
      runs: of neighbouring candidates; adjacent: share of gaps that are no wider than the spacing.
      starts_at_zero: 1 if the first frame is chosen.
      mean_gap, widest_gap: seconds between chosen frames; gap_ratio: widest / mean.
      largest_gap: seconds, the start and the end of the video included; largest_gap_share, span: shares of the video.
      coverage_16, coverage_64: share of 16 and 64 equal parts of the video that have a frame.
      position: mean place in the video, in [0, 1].
    """
    rows = {"starts_at_zero": float(times[0] == 0)}
    if len(times) > 1:
        gaps = np.diff(times)
        neighbours = gaps < 1.5 * spacing
        rows |= {"runs": float(1 + np.sum(~neighbours)), "adjacent": float(neighbours.mean())}
        rows |= {"mean_gap": float(gaps.mean()), "widest_gap": float(gaps.max())}
        rows |= {"gap_ratio": float(gaps.max() / gaps.mean()) if gaps.max() else 1.0}
    if duration is not None:
        largest = float(np.diff(times, prepend=0.0, append=duration).max())
        rows |= {"largest_gap": largest, "largest_gap_share": largest / duration}
        rows |= {"span": float(times[-1] - times[0]) / duration, "position": float(times.mean()) / duration}
        for parts in (16, 64):
            part = np.minimum((times / duration * parts).astype(int), parts - 1)
            rows[f"coverage_{parts}"] = len(np.unique(part)) / parts
    return rows


def overlap(frames: Sequence[int], others: Sequence[Sequence[int]]) -> dict[str, float]:
    """Share of frames in common with those of other questions about the video, on average; nothing without others."""
    shares = [len(set(frames) & set(other)) / max(len(frames), len(other)) for other in others]
    return {"overlap": float(np.mean(shares))} if shares else {}


def uniform_times(k: int, duration: float, clock: Clock | None) -> np.ndarray:
    """Seconds of k evenly spaced frames: of the video's frames where a clock is known, else of its duration."""
    if clock is None:
        return np.linspace(0, duration, k)
    return clock.seconds(np.linspace(0, int(duration * clock.fps) - 1, k, dtype=int))


# ---- a benchmark -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Chosen:
    """The frames chosen for one question: numbers in the video, their seconds, the video's clock."""

    frames: tuple[int, ...]
    times: np.ndarray
    clock: Clock


def read_chosen(
    benchmark: str, path: str | Path, items: Sequence[Item], time_base: str = "capped", allow_missing: bool = False
) -> dict[str, Chosen]:
    """The frames of an index file (either form of frame_indices.py), with their times.

    With `timestamps` (seconds) or `fps` in a row these are used, else the frame rate of the annotations; where they
    have none it is recovered from the frame numbers of all questions about a video.

    Returns: item id -> Chosen, for every item; with `allow_missing`, for those that the file has.

    Raises: BenchmarkError naming file, question and field.
    """
    if time_base not in TIME_BASES:
        raise BenchmarkError(f"time_base is {time_base!r}, not one of {', '.join(TIME_BASES)}")
    selections = frame_indices.read(path, benchmark, items, allow_missing=allow_missing)
    items = [item for item in items if item.id in selections]
    in_video: dict[str, set[int]] = {}
    for item in items:
        in_video.setdefault(item.video, set()).update(selections[item.id].frame_idx)
    clocks: dict[str, Clock] = {}
    chosen = {}
    for item in items:
        selection = selections[item.id]
        fps = selection.fps or item.fps
        if fps is not None:
            clock = Clock(fps)
        elif item.video in clocks:
            clock = clocks[item.video]
        else:
            try:
                clock = clocks[item.video] = Clock.recover(in_video[item.video], item.duration, time_base)
            except ValueError as error:
                raise BenchmarkError(f"{path}: video {item.video}: {error}") from None
        frames = selection.frame_idx
        times = clock.seconds(frames) if selection.timestamps is None else np.asarray(selection.timestamps)
        # A recovered rate is a whole number, up to 5 % below the true one.
        slack = 1 if fps is not None else 0.05 * (item.duration or 0) + 1
        if item.duration is not None and times[-1] > item.duration + slack:
            raise BenchmarkError(
                f"{path}: question {item.id}: frame {frames[-1]} is at {times[-1]:.1f} s, "
                f"behind the end of the video ({item.duration:.1f} s)"
            )
        chosen[item.id] = Chosen(frames, times, clock)
    return chosen


def evaluate(
    benchmark: str,
    annotations: str | Path,
    frame_idx: str | Path | None = None,
    num_frames: Sequence[int] = (),
    tolerances: Sequence[float] = (),
    time_base: str = "capped",
    allow_missing: bool = False,
    store: FrameStore | None = None,
) -> dict:
    """Keyframe metrics of an index file beside their references, as one JSON object.

    Args:
      benchmark: name.
      annotations: its annotation file.
      frame_idx: index file; without it only evenly spaced frames are measured.
      num_frames: numbers of evenly spaced frames to measure; by default the largest number in the index file, or 64.
      tolerances: seconds around a moment; by default those of the benchmark.
      time_base: of `Clock.recover`.
      allow_missing: measure the questions that the index file has, `num_missing` says how many it lacks.
      store: frames of the videos; then pictures are compared too, which takes a part of a second for each question and
        way of choosing.

    Returns: {"selections": {"frame_idx" | "uniform_K" | "other_question": {"all": metrics, grouping: {label: ...}}}}
      with percentages (one decimal) for shares, seconds (two decimals) for times.
    """
    if any(k < 1 for k in num_frames) or not all(tolerance >= 0 for tolerance in tolerances):
        raise BenchmarkError("numbers of frames must be at least 1, tolerances at least 0 seconds")
    every_item = items = benchmarks.read_items(benchmark, annotations)
    tolerances = tolerances or benchmarks.lookup(benchmark).tolerances
    chosen = read_chosen(benchmark, frame_idx, items, time_base, allow_missing) if frame_idx else {}
    if chosen:
        items = [item for item in items if item.id in chosen]
    if not num_frames:
        num_frames = (max(len(c.frames) for c in chosen.values()) if chosen else 64,)
    of_video: dict[str, list[Item]] = {}
    for item in items:
        of_video.setdefault(item.video, []).append(item)

    if store and (absent := sorted({item.video for item in items if item.moments and item.video not in store})):
        listed = ", ".join(absent[:3]) + (", ..." if len(absent) > 3 else "")
        raise BenchmarkError(f"{store.folder} lacks {len(absent)} of the {len(of_video)} videos: {listed}")

    def alike(item: Item, times: np.ndarray) -> dict[str, float]:
        return likeness(store, item, times) if store else {}

    def each(name: str) -> Iterable[Item]:
        return track(items, f"pictures of {name}", console=Console(stderr=True), transient=True) if store else items

    selections: dict[str, list[dict[str, float]]] = {}
    if chosen:
        selections["frame_idx"] = []
        for item in each("frame_idx"):
            own = chosen[item.id]
            others = [chosen[other.id].frames for other in of_video[item.video] if other is not item]
            selections["frame_idx"].append(
                near(own.times, item.moments, tolerances)
                | alike(item, own.times)
                | spread(own.times, item.duration, own.clock.spacing)
                | overlap(own.frames, others)
            )
    if all(item.duration is not None for item in items):
        for k in num_frames:
            selections[f"uniform_{k}"] = []
            for item in each(f"uniform_{k}"):
                # Where the annotations tell the frame rate, the reference is the same with and without an index file.
                clock = chosen[item.id].clock if chosen and item.fps is None else None
                times = uniform_times(k, item.duration, clock)
                selections[f"uniform_{k}"].append(
                    near(times, item.moments, tolerances)
                    | alike(item, times)
                    | spread(times, item.duration, clock.spacing if clock else 1.0)
                )
    if chosen and any(item.moments for item in items):
        selections["other_question"] = []
        for item in each("other_question"):
            of_same = of_video[item.video]
            other = of_same[(of_same.index(item) + 1) % len(of_same)]
            times = chosen[other.id].times
            rows = {} if other is item else near(times, item.moments, tolerances) | alike(item, times)
            selections["other_question"].append(rows)
    return {
        "benchmark": benchmark,
        "num_questions": len(items),
        "num_missing": len(every_item) - len(items),
        "num_videos": len(of_video),
        "tolerances": list(tolerances),
        "selections": {name: _tables(items, rows, tolerances) for name, rows in selections.items()},
    }


_SECONDS = ("mean_gap", "widest_gap", "largest_gap")
_OWN = ("distance", "annd_precision", "annd_recall")  # that a summary has in a form of their own
_NUMBERS = ("runs", "gap_ratio")


def _tables(items: Sequence[Item], rows: Sequence[dict[str, float]], tolerances: Sequence[float]) -> dict:
    """Metrics of all questions and of each group of each grouping."""
    groups: dict[str, dict[str, list[int]]] = {}
    for i, item in enumerate(items):
        for grouping, labels in item.groups.items():
            for label in labels:
                groups.setdefault(grouping, {}).setdefault(label, []).append(i)
    if {"600", "3600"} <= groups.get("duration_group", {}).keys():
        # Shorter videos have at most 64 candidates, so only these depend on the selection.
        groups["duration_group"]["600+3600"] = groups["duration_group"]["600"] + groups["duration_group"]["3600"]

    def table(indices: Sequence[int]) -> dict | None:
        return _summary([(items[i].video, rows[i]) for i in indices], tolerances)

    tables = {g: {label: table(i) for label, i in sorted(by.items())} for g, by in groups.items()}
    return {"all": table(range(len(items))), **tables}


def _summary(rows: Sequence[tuple[str, dict[str, float]]], tolerances: Sequence[float]) -> dict:
    """Means over the questions that have a metric; the median too where single questions dominate the mean."""

    def values(name: str) -> tuple[np.ndarray, list[str]]:
        having = [(row[name], video) for video, row in rows if name in row]
        return np.array([value for value, _ in having]), [video for _, video in having]

    summary: dict = {"n": len(rows)}
    distances, _ = values("distance")
    if len(distances):
        summary["n_annotated"] = len(distances)
        for kind in ("any", "all", "frac", "precision", "f1"):
            summary[kind] = {f"{t:g}": _percent(values(f"{kind}@{t}")[0].mean()) for t in tolerances}
        intervals = {f"{t:g}": statistics.clustered_mean(*values(f"frac@{t}"), resamples=1000) for t in tolerances}
        summary["frac_interval_95"] = {t: [_percent(e.low), _percent(e.high)] for t, e in intervals.items()}
        summary["mean_distance_s"] = round(float(distances.mean()), 2)
        summary["median_distance_s"] = round(float(np.median(distances)), 2)
        annd = [values(f"annd_{side}")[0].mean() for side in ("precision", "recall")]
        summary["annd_s"] = [round(float(mean), 2) for mean in annd]
    for name in sorted({name for _, row in rows for name in row if "@" not in name and name not in _OWN}):
        mean = values(name)[0].mean()
        if name in _SECONDS:
            summary[f"{name}_s"] = round(float(mean), 2)
        elif name in _NUMBERS:
            summary[name] = round(float(mean), 2)
            summary[f"median_{name}"] = round(float(np.median(values(name)[0])), 2)
        else:
            summary[name] = _percent(mean)
    if len(values("ssim_recall")[0]):
        means = (float(values(f"ssim_{side}")[0].mean()) for side in ("precision", "recall"))
        summary["ssim_f1"] = _percent(f1(*means))
    return summary


def _percent(share: float | None) -> float | None:
    return None if share is None else round(100 * float(share), 1)
