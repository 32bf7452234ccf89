"""Embeddings of the videos of a frame store: one of the whole video and one of each stretch, made once and kept.

    STORE/embeddings/MODEL-STRETCH/VIDEO.npz      rows [1 + S, E], times [1 + S, 2], the checksum of the frames

MODEL is the identity of the checkpoint and its settings, STRETCH the length in seconds: other ones have other folders.
CLIP needs no such files: its embeddings are means of the features that predecode keeps.
"""

import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from tspo_jax.checkpoints.folders import ClipEncoder
from tspo_jax.checkpoints.testa_folders import TestaModel
from tspo_jax.data.frame_store import FrameStore, StoreError, VideoEntry, check_side, publish


class VideoRows(NamedTuple):
    """Embeddings of a video.

    Attributes:
      rows: unit vectors float32 [1 + S, E], of the whole video and of its stretches in order.
      times: float64 [1 + S, 2], start and end in seconds.
    """

    rows: np.ndarray
    times: np.ndarray


class Embedder(Protocol):
    def texts(self, texts: list[str]) -> np.ndarray:
        """Unit vectors float32 [n, E]."""

    def video(self, name: str) -> VideoRows: ...

    def has(self, name: str) -> bool:
        """Whether `video` has nothing to compute."""


def stretches(timestamps: np.ndarray, seconds: float) -> list[np.ndarray]:
    """The frames of each stretch of a video: its frames within `seconds`, every half of it; the last one ends with the
    video. Frames are ascending; a stretch has at least one."""
    if seconds <= 0:
        raise ValueError(f"a stretch of {seconds} s; it must be positive")
    first, last = timestamps[0], timestamps[-1]
    starts = np.arange(first, max(last - seconds / 2, first) + 1e-9, seconds / 2)
    found = [np.flatnonzero((timestamps >= start) & (timestamps < start + seconds)) for start in starts]
    return [frames for frames in found if len(frames)]


def evenly(frames: np.ndarray, count: int) -> np.ndarray:
    """`count` of the frames, evenly, from the first on (the original's `nlvl_uniform`); repeated where there are fewer.

    Its default `uniform` cuts the step to whole frames and never sees the end of a video.
    """
    return frames[np.arange(count) * len(frames) // count]


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def _times(entry: VideoEntry, parts: list[np.ndarray]) -> np.ndarray:
    """Start of the first frame and end of the last of each part."""
    step = np.median(np.diff(entry.timestamps)) if entry.num_frames > 1 else 0.0
    return np.array([(entry.timestamps[part[0]], entry.timestamps[part[-1]] + step) for part in parts])


class ClipEmbedder:
    """Means of the unit vectors of frames, from the features in the store."""

    def __init__(self, store: str | Path, clip: ClipEncoder, seconds: float):
        self._store, self._clip, self._seconds = FrameStore(store, clip.identity), clip, seconds

    @property
    def names(self) -> list[str]:
        return self._store.names_with_features()

    @property
    def without_features(self) -> list[str]:
        """Videos of the store that cannot be searched."""
        return sorted(set(self._store.names()) - set(self.names))

    def has(self, name: str) -> bool:
        return True

    def texts(self, texts: list[str]) -> np.ndarray:
        return _unit(self._clip.text_features(texts))

    def video(self, name: str) -> VideoRows:
        entry, features = self._store.video(name), _unit(self._store.features(name))
        parts = [np.arange(entry.num_frames), *stretches(entry.timestamps, self._seconds)]
        return VideoRows(_unit(np.stack([features[part].mean(0) for part in parts])), _times(entry, parts))


class TestaEmbedder:
    """TESTA's features of `model.num_frames` frames of the whole video and of each stretch."""

    def __init__(self, store: str | Path, model: TestaModel, seconds: float):
        if not model.width:
            raise ValueError(f"{model.folder}: answers questions only, it has no features to compare")
        self._store, self.model, self._seconds = FrameStore(store), model, seconds
        check_side(store, self._store.settings, model.processor.size)
        self._folder = Path(store) / "embeddings" / f"{model.identity}-{seconds:g}"

    @property
    def names(self) -> list[str]:
        return self._store.names()

    def texts(self, texts: list[str]) -> np.ndarray:
        return self.model.text_features(texts)

    def has(self, name: str) -> bool:
        return self._kept(name) is not None

    def video(self, name: str) -> VideoRows:
        """Kept ones, or computed and kept."""
        kept = self._kept(name)
        if kept is None:
            entry = self._store.video(name)
            parts = [np.arange(entry.num_frames), *stretches(entry.timestamps, self._seconds)]
            rows = np.concatenate([self.model.video_features(self._clip(name, part)[None]) for part in parts])
            kept = VideoRows(rows, _times(entry, parts))
            crc32 = zlib.crc32(entry.crc32.tobytes())

            def write(partial: Path) -> None:
                with partial.open("wb") as file:  # a path without .npz would get one
                    np.savez(file, rows=kept.rows, times=kept.times, frames_crc32=crc32)

            publish(self._path(name), write)
        return kept

    def matching(self, name: str, text: str) -> float:
        """How much more the matching head says yes than no about the whole video and a text: its logit of yes."""
        frames = self._clip(name, np.arange(self._store.video(name).num_frames))
        return float(self.model.matching(frames[None], text)[0, 1])

    def _clip(self, name: str, part: np.ndarray) -> np.ndarray:
        return self._store.frames(name, evenly(part, self.model.num_frames))

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.npz"

    def _kept(self, name: str) -> VideoRows | None:
        """Raises StoreError for a damaged file; None where there is none, or one of other frames."""
        path = self._path(name)
        if not path.is_file():
            return None
        try:
            with np.load(path, allow_pickle=False) as kept:
                if int(kept["frames_crc32"]) != zlib.crc32(self._store.video(name).crc32.tobytes()):
                    return None
                return VideoRows(kept["rows"], kept["times"])
        except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise StoreError(f"{path}: damaged ({error}); delete it and run again") from error


class Found(NamedTuple):
    """A video that was found: `score` is the cosine of the whole video, `matching` the head's logit of yes where it was
    asked, `stretches` the best (start s, end s, cosine)."""

    video: str
    score: float
    matching: float | None
    stretches: list[tuple[float, float, float]]


class Index:
    """All videos' whole embeddings in memory, float32 [n, E]; those of stretches are read for what is found only.

    Args:
      progress: called with each name when it is in.
    Raises: ValueError where there is no video.
    """

    def __init__(self, names: list[str], embedder: Embedder, progress: Callable[[str], None] = lambda name: None):
        if not names:
            raise ValueError("the store holds no video to search, or none with features of this model")
        self.names, self._embedder = names, embedder
        whole = []
        for name in names:
            whole.append(embedder.video(name).rows[0])
            progress(name)
        self._whole = np.stack(whole)

    def search(self, text: str, num_videos: int, num_stretches: int = 3, rerank: int = 0) -> list[Found]:
        """The videos that fit best, best first.

        Args:
          rerank: so many of the likest are ordered anew by cosine + the matching head's logit of yes, as TESTA does
            (of an embedder with `matching`); the others stay behind them.
        """
        (query,) = self._embedder.texts([text])
        scores = self._whole @ query
        keep = min(max(num_videos, rerank), len(scores))
        order = np.argpartition(-scores, keep - 1)[:keep]
        order = order[np.argsort(-scores[order], kind="stable")]
        matching = {i: self._embedder.matching(self.names[i], text) for i in order[:rerank]}
        order = sorted(order, key=lambda i: (i not in matching, -(scores[i] + matching.get(i, 0.0))))
        found = []
        for i in order[:num_videos]:
            name = self.names[i]
            spans = self._stretches(name, query, num_stretches)
            found.append(Found(name, float(scores[i]), matching.get(i), spans))
        return found

    def _stretches(self, name: str, query: np.ndarray, count: int) -> list[tuple[float, float, float]]:
        rows, times = self._embedder.video(name)
        scores = rows[1:] @ query
        best = np.argsort(-scores, kind="stable")[:count]
        return [(float(times[1 + i, 0]), float(times[1 + i, 1]), float(scores[i])) for i in best]
