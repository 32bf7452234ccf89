"""Video -> candidate frames -> CLIP features -> scores of every candidate for a question.

A video is decoded and encoded once (`encode_video`); each of its questions then costs one text and one agent call.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from itertools import islice
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from tspo_jax.checkpoints.folders import ClipEncoder, agent_graphdef, agent_kind, agent_prefix, load_agent, load_clip
from tspo_jax.data.decode import Video
from tspo_jax.data.frame_store import FrameStore
from tspo_jax.models.clip import cosine_similarity
from tspo_jax.models.layers import merge_params
from tspo_jax.selection.methods import SPAN, select
from tspo_jax.selection.spans import best_span, frames_of_span

TEMPERATURE = 0.025  # that scores are given at; the order of the frames does not depend on it
AGENT_METHODS = ("topk", "bin-max", "aks", SPAN)  # the others look at no agent's scores
FRAME_BATCH = 64  # frames decoded and encoded at a time
LENGTH_MULTIPLE = 256  # videos are padded to multiples of it for scoring, so that few lengths are compiled


def read_agent(checkpoint: str | Path) -> dict:
    """The agent's parameters (nested dict of numpy arrays) in a checkpoint of train.py, as read_part names it."""
    from tspo_jax.runs.run_folder import read_part  # here: Orbax takes seconds to import, and --help does not need it

    return read_part(checkpoint, "agent")


@dataclasses.dataclass(frozen=True)
class Candidates:
    """The frames of a video that may be picked.

    Attributes:
      frame_idx: int [T], frame numbers of the video, ascending.
      timestamps: float [T], presentation times in seconds.
      features: raw CLIP image features float32 [T, D].
      fps, num_video_frames, decoder: of the video they come from.
    """

    frame_idx: np.ndarray
    timestamps: np.ndarray
    features: np.ndarray
    fps: float
    num_video_frames: int
    decoder: str


def encode_video(
    video: Video, clip: ClipEncoder, watch: Callable[[Iterable, int], Iterable] = lambda frames, total: frames
) -> Candidates:
    """The candidates of a video at 1 frame per second, with features.

    Args:
      watch: (frames, their number) -> the same frames; for a progress bar.
    Raises: decode.VideoError where the video cannot be read.
    """
    frame_idx = video.candidates()
    frames = iter(watch(video.frames(frame_idx), len(frame_idx)))
    features = [clip.image_features(batch, FRAME_BATCH) for batch in _batches(frames, FRAME_BATCH)]
    return Candidates(
        frame_idx,
        video.timestamps[frame_idx],
        np.concatenate(features),
        video.fps,
        video.num_frames,
        video.decoder,
    )


def stored_candidates(store: FrameStore, name: str) -> Candidates:
    """The candidates of a video of a frame store, as they were decoded and encoded for it."""
    video = store.video(name)
    return Candidates(
        video.frame_idx, video.timestamps, store.features(name), video.fps, video.num_video_frames, video.decoder
    )


@dataclasses.dataclass(frozen=True)
class Scorer:
    """CLIP and, where the folder holds one, the temporal agent."""

    clip: ClipEncoder
    agent: tuple[nnx.GraphDef, dict] | None

    def __call__(self, features: np.ndarray, text: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Scores of a video's candidates for one question.

        Args:
          features: raw CLIP features float [T, D] of the candidates.
          text: raw CLIP feature float [D] of the question.
        Returns:
          clip_scores float32 [T], cosines; and the agent's logits float32 [T], None without an agent.
        """
        if self.agent is None:
            return np.asarray(cosine_similarity(text, features)), None
        clip_scores, scores = self._of_frames(self._score, features, text)
        return clip_scores, scores

    def ask(self, features: np.ndarray, question: str) -> tuple[np.ndarray, np.ndarray | None]:
        """`__call__` with the question as text."""
        return self(features, self.clip.text_features([question], batch_size=1)[0])

    def span(self, features: np.ndarray, text: np.ndarray) -> tuple[int, int]:
        """The first and the last candidate of the evidence, as an agent of kind span predicts it.

        Raises: ValueError where its logits are not finite.
        """
        logits = self._of_frames(self._span_logits, features, text)[1]
        if not np.isfinite(logits).all():
            raise ValueError(f"the logits of {np.count_nonzero(~np.isfinite(logits).all(1))} candidates are not finite")
        return best_span(*logits.T)

    def _of_frames(self, program: Callable, features: np.ndarray, text: np.ndarray) -> list[np.ndarray]:
        """What a program of the agent gives for each candidate."""
        T = len(features)
        padded = np.pad(features, ((0, -T % LENGTH_MULTIPLE), (0, 0)))
        return [np.asarray(values)[:T] for values in program(self.agent[1], padded, text, T)]

    @cached_property
    def _score(self):
        return self._program(lambda agent: agent)

    @cached_property
    def _span_logits(self):
        return self._program(lambda agent: agent.span_logits)

    def _program(self, of_agent: Callable[[nnx.Module], Callable]):
        graphdef = self.agent[0]

        @jax.jit
        def score(params, features, text, num_frames):
            mask = jax.numpy.arange(len(features)) < num_frames
            clip_scores = cosine_similarity(text, features)
            with jax.default_matmul_precision("highest"):  # as in training, see programs.score
                logits = of_agent(merge_params(graphdef, params))(
                    features[None], text[None], clip_scores[None], mask[None], TEMPERATURE
                )
            return clip_scores, logits[0]

        return score


def load_scorer(folder: str | Path, window: int | None = None) -> Scorer:
    """The scorer of a TSPO folder, of a CLIP folder (no agent), or of a run folder: the agent of its newest checkpoint
    (RUN_DIR/best: of its best one, or a checkpoint's own folder) with the CLIP that its config names.

    Args:
      window: frames that a frame attends to; None = as the run was trained, 12 in other folders.
    Raises: ValueError for another window than the run's; CheckpointError, RunFolderError.
    """
    from tspo_jax.runs.run_folder import read_run_config, run_of

    run = run_of(folder)
    if run is None:
        return Scorer(load_clip(folder), load_agent(folder, window=window or 12) if agent_prefix(folder) else None)
    trained = read_run_config(run).get("agent")
    if not trained:
        raise ValueError(f"{folder}: is a run that trained no temporal agent")
    if not Path(trained["clip"]).is_dir():
        raise ValueError(f"{folder}: its agent was trained with the CLIP {trained['clip']}, which is not there")
    if window not in (None, trained["window"]):
        raise ValueError(f"{folder}: its agent was trained with a window of {trained['window']}, not {window}")
    clip = load_clip(trained["clip"], trained.get("clip_dtype", "float32"))  # older runs do not say it
    check_clip(folder, clip.identity, clip.folder)
    params = jax.device_put(read_agent(folder))
    shape = {"window": trained["window"], "num_heads": trained["num_heads"]}
    return Scorer(clip, (agent_graphdef(params, clip.width, **shape), params))


def check_clip(folder: str | Path, identity: str, clip: str | Path) -> None:
    """Raises ValueError where `folder` is a run, or a checkpoint of one, whose agent was trained with another CLIP than
    that of folder `clip` and this identity. Older runs do not say with which."""
    from tspo_jax.runs.run_folder import read_content, run_of

    run = run_of(folder)
    trained = read_content(run).get("agent.clip") if run else None
    if trained and trained.partition("-")[0] != identity.partition("-")[0]:  # whatever their dtypes
        raise ValueError(
            f"{folder}: its agent was trained with the features of another CLIP ({trained}) than {clip} ({identity})"
        )


def fits(scorer: Scorer, method: str) -> bool:
    """Whether the scorer's folder holds the agent that `method` needs, if it needs one."""
    if method == SPAN:
        return scorer.agent is not None and agent_kind(scorer.agent[1]) == SPAN
    return scorer.agent is not None or method not in AGENT_METHODS


def check_method(scorer: Scorer, method: str) -> None:
    """Raises ValueError where `method` needs an agent that the scorer's folder does not hold."""
    if fits(scorer, method):
        return
    if scorer.agent is None:
        raise ValueError(
            f"{scorer.clip.folder}: holds no temporal agent (selector.* tensors), which method {method} needs; "
            "give a TSPO folder (python -m tspo_jax.export makes one), or choose uniform or clip-topk"
        )
    raise ValueError(f"{scorer.clip.folder}: its agent predicts no spans (agent.kind), which method {SPAN} needs")


def pick(method: str, clip_scores: np.ndarray, scores: np.ndarray | None, k: int) -> np.ndarray:
    """Ascending indices into the candidates, all of them where there are fewer than k; see selection.select."""
    return select(method, clip_scores if scores is None else scores, clip_scores, k)


def pick_by(
    scorer: Scorer,
    method: str,
    features: np.ndarray,
    text: np.ndarray,
    scores: tuple[np.ndarray, np.ndarray | None],
    k: int,
) -> np.ndarray:
    """`pick`, by any method of an agent: `scores` are those that the scorer gave for features and text."""
    if method != SPAN:
        return pick(method, *scores, k)
    check_method(scorer, method)
    return frames_of_span(scorer.span(features, text), len(features), min(k, len(features)))


def _batches(items: Iterator, size: int) -> Iterator[list]:
    while batch := list(islice(items, size)):
        yield batch
