"""Questions about videos by a strategy of backtracking.py, with the answering Video-MLLM or SwinBERT as captioner: the
cores of `answer --strategy` and of an evaluation's methods flat and backtrack."""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from tspo_jax.answering.backtracking import STRATEGIES, Asked, Outcome, Settings, VideoFacts, run
from tspo_jax.answering.calls import Calls, Writer
from tspo_jax.answering.clip_captions import StoredClips
from tspo_jax.answering.own_models import OwnCaptioner, OwnWriter, TextAnswers
from tspo_jax.answering.rollout import Rollout
from tspo_jax.answering.writers import open_writer
from tspo_jax.checkpoints.folders import Answerer
from tspo_jax.checkpoints.swinbert_folders import load_captioner
from tspo_jax.data.decode import Video
from tspo_jax.data.frame_store import FrameStore, StoreSettings, VideoEntry


@dataclasses.dataclass(frozen=True)
class WriterOptions:
    """Who replies to prompts without a video.

    Attributes:
      name: "" = the answerer itself; else as `writers.open_writer`.
      model: that an address is asked for.
      context: tokens of a prompt and its reply together.
      max_new_tokens: of a reply.
      timeout: seconds.
    """

    name: str = ""
    model: str = ""
    context: int = 32768
    max_new_tokens: int = 512
    timeout: float = 120.0

    def open(self, answerer: Answerer, mesh: Mesh | None, attention: str, template: str) -> Writer:
        if self.name:
            limits = {"context": self.context, "max_new_tokens": self.max_new_tokens, "timeout": self.timeout}
            return open_writer(self.name, model=self.model, **limits)
        answers = TextAnswers(answerer, self.max_new_tokens, mesh=mesh, attention=attention, template=template)
        return OwnWriter(answers, self.context)


class VideoFiles:
    """Video files that are read as a frame store is: every frame of them is there."""

    def __init__(self, paths: Mapping[str, Path]):
        self.folder, self._paths = Path("the video files"), dict(paths)
        self.settings = StoreSettings(fps=float("inf"), short_side=0)
        self._open = functools.lru_cache(maxsize=8)(lambda name: Video(self._paths[name]))

    def __contains__(self, name: str) -> bool:
        return name in self._paths

    def video(self, name: str) -> VideoEntry:
        video, file = self._open(name), self._paths[name].stat()
        times = video.timestamps
        width, height = video.info.scaled_size(0)
        identity = f"{file.st_size} {file.st_mtime_ns}"
        numbers = np.arange(len(times))
        return VideoEntry(
            name, video.fps, len(times), times, numbers, width, height, video.decoder, file.st_size, identity
        )

    def frames(self, name: str, idx: Sequence[int]) -> np.ndarray:
        return np.stack(list(self._open(name).frames(idx)))


def facts(videos: FrameStore | VideoFiles, name: str) -> VideoFacts:
    """What the loop must know about a video, of files or of a store."""
    video = videos.video(name)
    fps = min(videos.settings.fps, video.fps)
    return VideoFacts(name, video.duration, fps, f"{video.source_sha256} {zlib.crc32(video.crc32.tobytes()):08x}")


def answer_questions(
    strategy: str,
    questions: Iterable[Asked],
    videos: FrameStore | VideoFiles,
    answerer: Answerer,
    settings: Settings,
    writer: WriterOptions,
    mesh: Mesh,
    *,
    captioner: str = "",
    calls_file: str | Path | None = None,
    caption_tokens: int = 256,
    batch_size: int = 8,
    encode_chunk: int = 16,
    attention: str = "auto",
    template: str = "",
    report: Callable[[Calls], None] = lambda calls: None,
    watch: Callable[[Outcome], None] = lambda outcome: None,
) -> Iterator[Outcome]:
    """Outcomes of questions, not in their order.

    Args:
      strategy: of backtracking.STRATEGIES.
      videos: of the questions.
      captioner: folder of SwinBERT; "" = the answerer describes the clips.
      calls_file: remembers every call, see calls.py; None = nothing is kept.
      caption_tokens: longest caption.
      batch_size: captions at a time, and questions on their way for each of them.
      encode_chunk, attention: of the rollout.
      report: called at the end with how many calls were made.
      watch: called with the outcome of a question after each look and each reply.
    """
    if captioner:
        describer = StoredClips(load_captioner(captioner), videos)
    else:
        limits = {"max_new_tokens": caption_tokens, "encode_chunk": encode_chunk}
        rollout = Rollout.of(answerer, **limits, mesh=mesh, attention=attention)
        describer = OwnCaptioner(answerer, videos, rollout, mesh, batch_size, template)
    replies = writer.open(answerer, mesh, attention, template)
    calls = Calls(calls_file, describer, replies, batch_size=batch_size)
    ask = STRATEGIES[strategy]
    steps = (ask(question, facts(videos, question.video), settings, replies, watch) for question in questions)
    yield from run(steps, calls, together=4 * batch_size)
    report(calls)
