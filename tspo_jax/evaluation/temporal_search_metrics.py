"""How near chosen frames are to annotated ones: LV-Haystack's metrics (T*, arXiv 2504.02259).

Beside recall, which keyframe_metrics.hits has, they count precision: the share of chosen frames that are near an
annotated moment. A selection of many frames has high recall for nothing.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.ndimage import correlate1d

_WINDOW, _SIGMA = 11, 1.5  # pixels, of SSIM
_C1, _C2 = 0.01**2, 0.03**2


def distances(times: np.ndarray, moments: Sequence[tuple[float, float]]) -> np.ndarray:
    """Seconds between chosen frames and annotated spans, 0 inside of one: times [K], moments [M] of (start, end) ->
    float64 [M, K]."""
    start, end = np.asarray(moments, np.float64).reshape(-1, 2).T[..., None]
    times = np.asarray(times, np.float64)
    return np.maximum(np.maximum(start - times, times - end), 0)


def agreement(
    times: np.ndarray, moments: Sequence[tuple[float, float]], tolerances: Sequence[float]
) -> dict[str, float]:
    """One question's precision@t, recall@t and f1@t at each tolerance t (seconds, inclusive), and its mean distances.

    Args:
      times: seconds of the chosen frames [K]; one that is chosen twice counts twice.
      moments: annotated spans in seconds.
    Returns: shares in [0, 1]; `annd_precision` (mean distance of a chosen frame to the nearest moment, seconds) and
      `annd_recall` (the other way round). Nothing without moments; zeros, and no distances, without frames.
    """
    if not len(moments):
        return {}
    if not len(times):
        return {f"{name}@{t}": 0.0 for t in tolerances for name in ("precision", "recall", "f1")}
    apart = distances(times, moments)
    of_frames, of_moments = apart.min(axis=0), apart.min(axis=1)
    rows = {"annd_precision": float(of_frames.mean()), "annd_recall": float(of_moments.mean())}
    for t in tolerances:
        precision, recall = float((of_frames <= t).mean()), float((of_moments <= t).mean())
        rows |= {f"precision@{t}": precision, f"recall@{t}": recall, f"f1@{t}": f1(precision, recall)}
    return rows


def f1(precision: float, recall: float) -> float:
    """Their harmonic mean, 0 where both are."""
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


@dataclasses.dataclass(frozen=True)
class HaystackItem:
    """A question of LV-Haystack: annotated frame numbers of a video of `fps`, and the seconds that were chosen."""

    fps: float
    annotated: Sequence[int]
    chosen: Sequence[float]


def released(items: Sequence[HaystackItem], tolerance: float, whole_seconds: bool = False) -> Mapping[str, float]:
    """Means over questions as LV-Haystack's script gives them: `precision`, `recall`, `f1` (mean of the questions'),
    `annd_precision` and `annd_recall`.

    It leaves questions out that have no annotation or no chosen frame; `agreement` counts the latter as 0.

    Args:
      tolerance: seconds.
      whole_seconds: as before it was fixed (2025-09): both sides are cut to whole seconds first.
    Raises: ValueError where no question is left.
    """
    rows = []
    for item in items:
        if not len(item.annotated) or not len(item.chosen):
            continue
        moments, times = np.asarray(item.annotated) / item.fps, np.asarray(item.chosen, np.float64)
        if whole_seconds:
            moments, times = moments.astype(int), times.astype(int)
        rows.append(agreement(times, [(moment, moment) for moment in moments], (tolerance,)))
    if not rows:
        raise ValueError("no question has both annotated and chosen frames")
    return {name.partition("@")[0]: float(np.mean([row[name] for row in rows])) for name in rows[0]}


# ---- similarity of pictures ------------------------------------------------------------------------------


def ssim(a: np.ndarray, b: np.ndarray, rows_as_channels: bool = False) -> float:
    """Structural similarity of two pictures uint8 [H, W, 3] of one size, at most 1.

    Gaussian windows of 11 pixels (sigma 1.5), zeros around the picture, the mean over pixels and channels.

    Args:
      rows_as_channels: as LV-Haystack's script computes it: every row of the picture is a W x 3 picture of its own.
    Raises: ValueError for pictures of different sizes.
    """
    if a.shape != b.shape:
        raise ValueError(f"pictures of {a.shape} and {b.shape} cannot be compared; resize one")
    place = np.arange(_WINDOW) - _WINDOW // 2
    window = np.exp(-(place**2) / (2 * _SIGMA**2))
    window /= window.sum()

    def blur(x: np.ndarray) -> np.ndarray:
        for axis in (1, 2) if rows_as_channels else (0, 1):
            x = correlate1d(x, window, axis, mode="constant")
        return x

    a, b = a.astype(np.float64) / 255, b.astype(np.float64) / 255
    mean_a, mean_b = blur(a), blur(b)
    variance_a, variance_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    covariance = blur(a * b) - mean_a * mean_b
    likeness = (2 * mean_a * mean_b + _C1) * (2 * covariance + _C2)
    return float((likeness / ((mean_a**2 + mean_b**2 + _C1) * (variance_a + variance_b + _C2))).mean())


def ssim_matrix(
    annotated: Sequence[np.ndarray], chosen: Sequence[np.ndarray], rows_as_channels: bool = False
) -> np.ndarray:
    """`ssim` of every annotated with every chosen picture: float64 [M, K]."""
    return np.array([[ssim(a, b, rows_as_channels) for b in chosen] for a in annotated])


def ssim_agreement(matrix: np.ndarray) -> dict[str, float]:
    """One question's `ssim_precision` (mean over chosen frames of the best annotated one) and `ssim_recall` (the other
    way round) of a matrix [M, K].

    The script takes the F1 of the two means over questions, not the mean of F1s.
    """
    return {"ssim_precision": float(matrix.max(axis=0).mean()), "ssim_recall": float(matrix.max(axis=1).mean())}
