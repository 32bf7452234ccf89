"""A prompt with a video in it, as the language model of any Video-MLLM reads it."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

VIDEO_TOKEN = -200  # stands in the token ids where the visual tokens go


# Position of the first text token behind a video: behind all positions of the video (transformers up to 4.x, and the
# published numbers), or behind its height and width only (5.x; time may reach further than that).
NEXT_POSITION_RULES = ("after_all", "after_space")


@dataclasses.dataclass(frozen=True)
class VideoOptions:
    """What a model may leave open about how it is shown a video. Qwen2.5-VL does; LLaVA-Video takes no other values."""

    frame_size: tuple[int, ...] = ()  # height, width of every frame; () = near each video's own, with its aspect ratio
    # Seconds that a pair of frames lasts. Chosen frames are no fixed time apart, and the original passes none, for
    # which transformers 4.x takes 1.
    second_per_grid: float = 1.0
    next_position: str = "after_all"  # one of NEXT_POSITION_RULES


DEFAULT_VIDEO = VideoOptions()


class Prompt(NamedTuple):
    """P prompts, right padded to N tokens.

    Attributes:
      embeddings: [P, N, hidden].
      positions: rotary positions of the tokens, int [P, N], or [P, N, 3] where time, height and width have their own.
      lengths: int [P], the visual tokens included.
      following: int [P], the rotary position of the first generated token.
    """

    embeddings: jax.Array
    positions: jax.Array
    lengths: jax.Array
    following: jax.Array


def splice(text: jax.Array, visual: jax.Array, ids: jax.Array) -> jax.Array:
    """Text embeddings [P, N, hidden] with M visual tokens [P, M, hidden] in the place of each row's one VIDEO_TOKEN.

    Returns [P, N - 1 + M, hidden].
    """
    M = visual.shape[1]
    start = video_start(ids)[:, None]
    slot = jnp.arange(ids.shape[1] - 1 + M)[None]
    is_visual = (slot >= start) & (slot < start + M)
    from_text = jnp.where(slot < start, slot, slot - M + 1).clip(0, ids.shape[1] - 1)
    from_visual = (slot - start).clip(0, M - 1)
    return jnp.where(
        is_visual[..., None],
        jnp.take_along_axis(visual, from_visual[..., None], axis=1),
        jnp.take_along_axis(text, from_text[..., None], axis=1),
    )


def video_start(ids: jax.Array) -> jax.Array:
    """Where the video begins: int [P] of ids int [P, N]."""
    return jnp.argmax(ids == VIDEO_TOKEN, axis=1)
