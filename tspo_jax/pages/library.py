"""The videos that the page of `serve` shows, and what is found for a question about one of them."""

import dataclasses
import functools
import os
import tempfile
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from tspo_jax.answering import prompts
from tspo_jax.answering.agent_prompts import Asked
from tspo_jax.answering.backtracking import STRATEGIES, Outcome, Settings, Watch
from tspo_jax.answering.given_frames import answer
from tspo_jax.answering.own_models import default_mesh
from tspo_jax.answering.rollout import Rollout
from tspo_jax.answering.strategies import WriterOptions, answer_questions
from tspo_jax.checkpoints.folders import Answerer, load_answerer
from tspo_jax.data import decode_workers, frame_store, predecoding, preview
from tspo_jax.data.decode import Video, VideoError
from tspo_jax.data.frame_store import FrameStore
from tspo_jax.data.questions import split_options
from tspo_jax.data.shard import Shard
from tspo_jax.data.video_files import VIDEO_SUFFIXES, is_video_name, videos_below
from tspo_jax.models.video_prompt import FrameTimes
from tspo_jax.pages import templates, trace_page, video_page
from tspo_jax.selection.choosing import choose
from tspo_jax.selection.methods import SEARCH
from tspo_jax.selection.scoring import Scorer
from tspo_jax.selection.searching import Searcher
from tspo_jax.selection.video_source import Source, stored_source

InRounds = Callable[[str, FrameStore, Asked, Watch], Outcome]
KEPT_PREVIEWS = 4096  # of some 5 kB


class RequestError(ValueError):
    """A request that is refused: an HTTP status and why."""

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status = status


@dataclasses.dataclass
class Job:
    """A question and how far it is: `waiting`, `decoding`, `encoding`, `answering`, `done` or `failed`."""

    state: str = "waiting"
    share: float = 0.0  # of the video that is decoded or encoded
    html: str = ""  # the result, or why there is none; of an answer in rounds also what there is of it so far
    answer: str | None = None  # of the method that was asked for, where there is an answerer

    def report(self, state: str, share: float) -> None:
        self.state, self.share = state, share


def is_inside(name: str) -> bool:
    """Whether a name can only mean something in a folder or below it."""
    return "\0" not in name and not {"", ".", ".."} & set(name.split("/"))


class Library:
    """The videos of a folder and of a frame store. Only `ask` must not be called by two threads at a time.

    Args:
      folder: of video files; None = those of the store alone.
      store: frame store, made if it is not there; videos of the folder are added when they are asked about.
      scorer: chooses the frames.
      answer: (frames, question, their times) -> text, if any.
      searcher: of method tstar, if there is one.
      in_rounds: (strategy, store, question with its video, watch) -> its outcome, if any.
    """

    def __init__(
        self,
        folder: Path | None,
        store: Path,
        scorer: Scorer,
        answer: Callable[[list, str, FrameTimes], str] | None = None,
        searcher: Searcher | None = None,
        in_rounds: InRounds | None = None,
    ):
        self.folder = folder and folder.resolve()
        if folder and not (store / "store.json").exists():
            frame_store.open_settings(store, frame_store.StoreSettings())
        frame_store.read_settings(store)
        self.store = store
        self.scorer = scorer
        self.answer = answer
        self.searcher = searcher
        self.in_rounds = in_rounds
        self._previews = functools.lru_cache(KEPT_PREVIEWS)(self._make_preview)
        self._few = threading.BoundedSemaphore(2)  # previews made at a time: a question may be worked on meanwhile

    def names(self) -> list[str]:
        """All videos, sorted; those in folders below by their path."""
        files = videos_below(self.folder)[0] if self.folder else ()
        return sorted({name for name in files if self._file(name)} | set(FrameStore(self.store).names()))

    def _file(self, name: str) -> Path | None:
        """The file of this name in the folder, if it is a video; a link out of the folder is none."""
        if not self.folder or not is_inside(name) or not is_video_name(name):
            return None
        path = self.folder / name
        return path if path.is_file() and path.resolve().is_relative_to(self.folder) else None

    def path(self, name: str) -> Path | None:
        """The file of a video, None where only the store has it; RequestError for what is in neither."""
        try:
            path = self._file(name)
            if path or (is_inside(name) and name in FrameStore(self.store)):
                return path
        except (OSError, UnicodeError):  # what the file system takes for no name
            pass
        raise RequestError(404, f"there is no video {name!r} here")

    def preview(self, name: str) -> dict:
        """{"seconds": length or None, "picture": data URI} of a video; VideoError where it cannot be read."""
        path = self.path(name)
        status = path and path.stat()
        return self._previews(name, status and (status.st_size, status.st_mtime_ns))

    def _make_preview(self, name: str, _stamp: tuple | None) -> dict:
        """`_stamp` tells a file from the one that was there before."""
        path, store = self.path(name), FrameStore(self.store)
        with self._few:
            if self._is_decoded(store, name, path):
                video = store.video(name)
                (picture,) = store.frames(name, [int(preview.AT * video.num_frames)])
                looks = preview.Preview(video.num_video_frames / video.fps, picture)
            else:
                looks = preview.preview(path, templates.THUMBNAIL)
        return {"seconds": looks.seconds, "picture": templates.jpeg_uri(looks.picture)}

    def still(self, name: str, seconds: float) -> bytes:
        """JPEG of what is on screen at a moment of a video, of the frames in the store; RequestError where it has none
        of the video."""
        store = FrameStore(self.store)
        if not self._is_decoded(store, name, self.path(name)):
            raise RequestError(404, f"{name} is not decoded yet")
        shown = np.searchsorted(store.video(name).timestamps, seconds + 1e-3, side="right") - 1
        return next(store.jpegs(name, [max(0, int(shown))]))

    def ask(self, job: Job, name: str, question: str, num_frames: int, method: str, show: bool = True) -> str:
        """HTML of what is found for a question; "" without `show`, when only `job.answer` is wanted."""
        source, answers = self._source(job, name), {}
        if method in STRATEGIES:
            html = self._ask_in_rounds(job, name, question, method)
            return html if show else ""
        found = self.searcher(source, question, num_frames) if method == SEARCH else None
        if self.answer:
            job.state = "answering"
            picks = found.picks.tolist() if found else choose(source, self.scorer, question, num_frames, method)
            job.answer = answers[method] = self.answer(source.pictures(picks), question, source.times(picks))
        if not show:
            return ""
        example = video_page.example(self.scorer, source, question, num_frames, answers, found)
        return templates.render("found.html", example=example)

    def _ask_in_rounds(self, job: Job, name: str, question: str, strategy: str) -> str:
        """HTML of how a question was answered; meanwhile `job.html` is that of what there is so far."""
        text, options = split_options(question)
        job.state = "answering"

        def watch(outcome: Outcome) -> None:
            job.html = trace_page.part(dataclasses.asdict(outcome))

        asked = Asked("", name, text or question, options)
        outcome = self.in_rounds(strategy, FrameStore(self.store), asked, watch)
        job.answer = outcome.answer or "no answer"
        return trace_page.part(dataclasses.asdict(outcome))

    @staticmethod
    def _is_decoded(store: FrameStore, name: str, path: Path | None) -> bool:
        """Whether the store has the frames of a video, and not those of another file that had its name."""
        return name in store and (path is None or store.video(name).source_size == path.stat().st_size)

    def _source(self, job: Job, name: str) -> Source:
        """A video of the store, which it is added to where its frames or features are not there, or of another file."""
        path, store, clip = self.path(name), FrameStore(self.store), self.scorer.clip
        size = path and path.stat().st_size
        decoded = self._is_decoded(store, name, path)
        encoded = decoded and frame_store.features_path(self.store, clip.identity, name).is_file()
        if not encoded or not FrameStore(self.store, clip.identity).has_features(name):
            with predecoding.writing(self.store, Shard()):
                if not decoded:
                    video = decode_workers.Job(str(path), name, size, str(self.store), store.settings, ("auto",))
                    decode_workers.decode_video(video, functools.partial(job.report, "decoding"))
                predecoding.encode_features(self.store, [name], clip, report=functools.partial(job.report, "encoding"))
        return stored_source(FrameStore(self.store, clip.identity), name)

    def save(self, name: str, body: Iterable[bytes]) -> None:
        """A new video of the folder; RequestError unless it is one. Nothing of another file stays."""
        if not self.folder:
            raise RequestError(403, "videos are not taken: the page shows a frame store")
        if "/" in name or not is_inside(name) or name.startswith(".") or not is_video_name(name):
            raise RequestError(400, f"{name!r} is not the name of a video ({', '.join(VIDEO_SUFFIXES)})")
        descriptor, partial = tempfile.mkstemp(dir=self.folder, prefix=".upload_")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.writelines(body)
            try:
                Video(partial)
            except VideoError as error:
                raise RequestError(415, f"{name} {error.reason}") from None
            try:
                os.link(partial, self.folder / name)
            except FileExistsError:
                raise RequestError(409, f"there is a video {name} already") from None
        finally:
            os.unlink(partial)


def load(folder: str | Path, adapter: str = "") -> Answerer:
    """The Video-MLLM of a folder, with the adapters of a PEFT folder if given."""
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    return load_answerer(folder, dtype, adapter=adapter)


def in_rounds_by(answerer: Answerer, max_new_tokens: int, settings: Settings, writer: WriterOptions) -> InRounds:
    """Answers in rounds by this captioner. Calls are remembered as long as the page is there."""
    folder = tempfile.TemporaryDirectory(prefix="tspo_calls_")

    def say(strategy: str, store: FrameStore, asked: Asked, watch: Watch) -> Outcome:
        options = {"calls_file": Path(folder.name) / "calls.jsonl", "caption_tokens": max_new_tokens, "watch": watch}
        outcomes = answer_questions(strategy, [asked], store, answerer, settings, writer, default_mesh(), **options)
        return next(iter(outcomes))

    return say


def answer_by(answerer: Answerer, max_new_tokens: int) -> Callable[[list, str, FrameTimes], str]:
    """(frames, question, times) -> text."""
    rollout = Rollout.of(answerer, max_new_tokens=max_new_tokens)

    def say(frames: list, question: str, times: FrameTimes) -> str:
        return answer(answerer, rollout, frames, prompts.render(question, answerer.template), times=times)["answer"]

    return say
