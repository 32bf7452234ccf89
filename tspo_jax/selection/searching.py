"""Frames of a video by searching it for objects: method tstar, for whoever chooses frames.

The objects are named by the user, by the question's own line, or by a Video-MLLM that is shown a few frames
(answering/grounding.py). A question whose objects are not found gets evenly spaced frames, and its result says why.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from tspo_jax.checkpoints.detector import Detector
from tspo_jax.command_line import entry_point
from tspo_jax.selection import grounding, methods, tstar
from tspo_jax.selection.search_options import SearchOptions, objects
from tspo_jax.selection.search_rounds import Search, texts_of
from tspo_jax.selection.video_source import Source

# (frames, question) -> targets and cues; ValueError where the model names none that can be read.
Ground = Callable[[Sequence[np.ndarray], str], tuple[Sequence[str], Sequence[str]]]


@dataclasses.dataclass(frozen=True)
class Found:
    """What a search gives.

    Attributes:
      picks: ascending candidate indices.
      scores: float [T], of every candidate.
      searched: what results report of it.
    """

    picks: np.ndarray
    scores: np.ndarray
    searched: dict


@dataclasses.dataclass(frozen=True)
class Searcher:
    """A detector, how it searches, and where the names of objects come from.

    Attributes:
      targets, cues: for every question that brings none of its own.
      ground: names the objects of a question where neither it nor `targets` does.
    """

    detector: Detector
    options: SearchOptions = SearchOptions()
    targets: tuple[str, ...] = ()
    cues: tuple[str, ...] = ()
    ground: Ground | None = None

    def __call__(
        self, source: Source, question: str, k: int, targets: Sequence[str] = (), cues: Sequence[str] = ()
    ) -> Found:
        """Chooses k candidates of a video, one per second at most; only frames that are looked at are read.

        `searched` is {frames, detections, rounds: numbers; targets, cues: what was searched; found: the targets that
        were seen in a frame alone; fallback: why frames are evenly spaced instead, or null; notes}.

        Raises: ValueError where nothing can name objects: no targets and no `ground`.
        """
        seconds = one_per_second(source.timestamps)
        seen: set[int] = set()

        def look(which: Sequence[int]) -> list[np.ndarray]:
            """Frames of these seconds in their order; each is read once."""
            seen.update(map(int, which))
            wanted, places = np.unique(which, return_inverse=True)
            frames = source.pictures(seconds[wanted].tolist())
            return [frames[place] for place in places]

        names, notes = self._objects(question, targets, cues, look, len(seconds))
        options = dataclasses.replace(self.options, picture_size=self.detector.processor.size)
        if not names[0]:
            search = tstar.not_searched(len(seconds), k, notes[-1])
        else:
            queries = self.detector.queries(texts_of(*names))
            notes += [f"{text!r} is longer than the detector reads; its end was cut off" for text in queries.cut]
            detect = lambda pictures: self.detector.detect(pictures, queries)  # noqa: E731
            search = tstar.search(len(seconds), look, detect, *names, k, options)
        stride = int(seconds[1] - seconds[0]) if len(seconds) > 1 else 1
        scores = np.repeat(search.score, stride)[: len(source.frame_idx)]
        return Found(seconds[search.picks], scores, _report(search, names, len(seen), notes))

    def _objects(
        self, question: str, targets: Sequence[str], cues: Sequence[str], look: tstar.Look, num_seconds: int
    ) -> tuple[tuple[tuple[str, ...], tuple[str, ...]], list[str]]:
        """The targets and cues of a question, and what to say of them; no targets where the model named none."""
        for own in ((targets, cues), (self.targets, self.cues)):
            names = objects(*own)
            if names[0]:
                return names, []
        if self.ground is None:
            raise ValueError(
                f"method {methods.SEARCH}: nothing names the objects to look for; give targets, or an answerer that "
                "names them"
            )
        try:
            names = objects(*self.ground(look(grounding.frame_numbers(num_seconds)), question))
        except ValueError as error:
            return ((), ()), [str(error)]
        return names, [] if names[0] else ["no object to search for was named"]


def one_per_second(timestamps: np.ndarray) -> np.ndarray:
    """Indices of every n-th candidate, so that they are about a second apart; all where they are no closer."""
    spacing = float(np.median(np.diff(timestamps))) if len(timestamps) > 1 else 1.0
    stride = max(1, round(1 / spacing)) if spacing > 0 else 1
    return np.arange(0, len(timestamps), stride)


def _report(search: Search, names: tuple[Sequence[str], Sequence[str]], num_frames: int, notes: Sequence[str]) -> dict:
    targets, cues = names
    left = search.rounds[-1].remaining if search.rounds else range(len(targets))
    fallback = search.fallback or None
    return {
        "frames": num_frames,
        "detections": search.num_detections,
        "rounds": len(search.rounds),
        "targets": list(targets),
        "cues": list(cues),
        "found": [target for i, target in enumerate(targets) if i not in left],
        "fallback": fallback,
        "notes": [note for note in (*notes, *search.notes) if note != fallback],
    }


def search_frames(searcher: Searcher, source: Source, question: str, num_frames: int) -> dict:
    """The frames for `question`, as entry points report them: as choosing.select_frames, with `searched`, the final
    score of every candidate as `scores`, and no `clip_scores`. What a user should know of the search is told on stderr.
    """
    if not question.strip():
        raise ValueError("the question is empty")
    found = searcher(source, question, num_frames)
    tell(found.searched)
    return {
        "frame_idx": source.frame_idx[found.picks].tolist(),
        "timestamps": source.timestamps[found.picks].tolist(),
        "candidate_idx": source.frame_idx.tolist(),
        "clip_scores": None,
        "scores": found.scores.tolist(),
        "fps": source.fps,
        "num_video_frames": source.num_video_frames,
        "method": methods.SEARCH,
        "decoder": source.decoder,
        "searched": found.searched,
    }


def tell(searched: dict) -> None:
    """What a user should know of a search, on stderr."""
    if searched["fallback"]:
        entry_point.note(f"evenly spaced frames: {searched['fallback']}")
    for text in searched["notes"]:
        entry_point.note(text)
