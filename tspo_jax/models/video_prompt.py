"""A prompt with a video in it, as the language model of any Video-MLLM reads it."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

VIDEO_TOKEN = -200  # stands in the token ids where visual tokens go: of the whole video, or of a pair of frames


# Position of the first text token behind a video: behind all positions of the video (transformers up to 4.x, and the
# published numbers), or behind its height and width only (5.x; time may reach further than that).
NEXT_POSITION_RULES = ("after_all", "after_space")
UNKNOWN_SECOND_PER_GRID = 1.0  # where nobody knows the frames' times: what transformers 4.x takes


class FrameTimes(NamedTuple):
    """When the frames of a set are shown in their video.

    Attributes:
      seconds: float64 [K], presentation times, ascending.
      duration: of the video, in seconds; None where it is not known.
    """

    seconds: np.ndarray
    duration: float | None = None

    @classmethod
    def of(cls, seconds: Sequence[float], duration: float | None = None) -> "FrameTimes":
        """Raises ValueError where a time is not a number from 0 on, or they run backwards."""
        seconds = np.asarray(seconds, np.float64)
        if seconds.ndim != 1 or not np.isfinite(seconds).all() or (seconds < 0).any():
            raise ValueError(f"times of frames are {seconds.tolist()}, not numbers of seconds from 0 on")
        if (backwards := np.flatnonzero(np.diff(seconds) < 0)).size:
            i = int(backwards[0])
            raise ValueError(
                f"times of frames run backwards: frame {i + 1} is at {seconds[i + 1]:g} s, behind {seconds[i]:g} s"
            )
        return cls(seconds, duration)

    @classmethod
    def unknown(cls, num_frames: int) -> "FrameTimes":
        """Of frames whose times nobody knows: two of them last UNKNOWN_SECOND_PER_GRID."""
        return cls(np.arange(num_frames) * (UNKNOWN_SECOND_PER_GRID / 2))


@dataclasses.dataclass(frozen=True)
class VideoOptions:
    """What a model may leave open about how it is shown a video; each takes the options that it knows."""

    # Qwen: height, width of every frame; () = near each video's own, with its aspect ratio.
    frame_size: tuple[int, ...] = ()
    # Qwen: seconds that a pair of frames lasts, as if they were evenly spaced; 0 = the frames' own times. The published
    # numbers of Qwen2.5-VL are made with 1.
    second_per_grid: float = 0.0
    next_position: str = "after_all"  # Qwen2.5-VL: one of NEXT_POSITION_RULES
    # Qwen3-VL: markers around the whole video besides those around each pair, as the processor of transformers writes
    # them since 5.10; without them as up to 5.9.
    outer_markers: bool = True
    time_instruction: bool = False  # LLaVA-Video: a sentence with the video's length and the frames' times
    # LLaVA-Video, Qwen2.5-VL: alike frames (or pairs) of a set, and alike patches of each, that are merged away before
    # the language model, at most half of either; () = none. docs/tokens.md.
    merge: tuple[int, ...] = ()

    def seconds(self, times: FrameTimes, frames_per_grid: int) -> np.ndarray:
        """The times that frames are shown with: float64 [K]."""
        if not self.second_per_grid:
            return times.seconds
        return np.arange(len(times.seconds)) * (self.second_per_grid / frames_per_grid)


DEFAULT_VIDEO = VideoOptions()


class Prompt(NamedTuple):
    """P prompts, right padded to N tokens.

    Attributes:
      embeddings: [P, N, hidden].
      positions: rotary positions of the tokens, int [P, N], or [P, N, 3] where time, height and width have their own.
      lengths: int [P], the visual tokens included.
      following: int [P], the rotary position of the first generated token.
      added: [P, D, N, hidden], what is added behind the first D layers; None = nothing.
    """

    embeddings: jax.Array
    positions: jax.Array
    lengths: jax.Array
    following: jax.Array
    added: jax.Array | None = None


def add_behind(layer: jax.Array, x: jax.Array, added: jax.Array | None) -> jax.Array:
    """The output of a layer [P, N or more, hidden], with what `Prompt.added` puts behind it."""
    if added is None:
        return x
    _, D, N, _ = added.shape
    return jax.lax.cond(layer < D, lambda x: x.at[:, :N].add(added[:, layer].astype(x.dtype)), lambda x: x, x)


class Layout(NamedTuple):
    """What stands in the slots of prompts behind the visual tokens' insertion; all [P, S].

    Attributes:
      source: int, the place in the ids that a slot comes from.
      is_visual: bool.
      visual: int, which of the row's visual tokens it is, where it is one.
    """

    source: jax.Array
    is_visual: jax.Array
    visual: jax.Array


def lay_out(ids: jax.Array, num_videos: int, num_tokens: int, used: jax.Array | None = None) -> Layout:
    """Ids int [P, N] of which each row's VIDEO_TOKENs, at most `num_videos`, make room for `num_tokens` visual tokens
    each, or for the first `used` int [P] of them. What is left of the slots is behind the row's text."""
    P, N = ids.shape
    slots = N + num_videos * (num_tokens - 1)
    is_tag = ids == VIDEO_TOKEN
    width = jnp.where(is_tag, num_tokens if used is None else used[:, None], 1)
    start = jnp.cumsum(width, axis=1) - width
    begins = jnp.zeros((P, slots), jnp.int32).at[jnp.arange(P)[:, None], start].set(1, mode="drop")
    source = jnp.cumsum(begins, axis=1) - 1
    of_source = partial(jnp.take_along_axis, indices=source, axis=1)
    number = of_source(jnp.cumsum(is_tag, axis=1) - 1)
    visual = number * num_tokens + jnp.arange(slots) - of_source(start)
    return Layout(source, of_source(is_tag), jnp.clip(visual, 0, num_videos * num_tokens - 1))


def splice(text: jax.Array, visual: jax.Array, ids: jax.Array, used: jax.Array | None = None) -> jax.Array:
    """Text embeddings [P, N, hidden] with visual tokens in the places of each row's VIDEO_TOKENs.

    `visual` [P, n, M, hidden]: M tokens (of which the first `used` int [P] count, if given) for each of the at most n
    VIDEO_TOKENs of a row of ids int [P, N]. Returns [P, N + n * (M - 1), hidden].
    """
    P, n, M, _ = visual.shape
    layout = lay_out(ids, n, M, used)
    return jnp.where(
        layout.is_visual[..., None],
        jnp.take_along_axis(visual.reshape(P, n * M, -1), layout.visual[..., None], axis=1),
        jnp.take_along_axis(text, layout.source[..., None], axis=1),
    )


def text_prompt(embeddings: jax.Array, lengths: jax.Array) -> Prompt:
    """Prompts without a video: text embeddings [P, N, hidden], right padded, of lengths int [P].

    Every family of models counts the positions of text alone by one, on all of its axes.
    """
    P, N, _ = embeddings.shape
    return Prompt(embeddings, jnp.broadcast_to(jnp.arange(N), (P, N)), lengths, lengths)


def video_start(ids: jax.Array) -> jax.Array:
    """Where the video begins: int [P] of ids int [P, N]."""
    return jnp.argmax(ids == VIDEO_TOKEN, axis=1)
