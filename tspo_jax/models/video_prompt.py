"""A prompt with a video in it, as the language model of any Video-MLLM reads it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

VIDEO_TOKEN = -200  # stands in the token ids where the visual tokens go


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
