"""A temporal agent that says where the evidence begins and ends (after LSTP, arXiv 2402.16050; without its optical
flow, BLIP-2 and dialogue model).

Two logits per frame, of being the evidence's first and its last, are those of the question-aware agent, whose attention
sees the question, and an edge: how well the frames shortly before it and shortly after it match the question, each
without the frame itself, weighted by the question, once for each of the two logits. The edges are zero at first, so
that a new agent's best span is its best frame.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from tspo_jax.models.question_aware_agent import MATCH_UNIT, QuestionAwareAgent, direction


class SpanAgent(QuestionAwareAgent):
    """Called like `TemporalAgent`: then a frame's score is the mean of its two logits."""

    def __init__(self, width: int, *, num_heads: int = 8, window: int = 12, rngs: nnx.Rngs):
        super().__init__(width, num_heads=num_heads, window=window, rngs=rngs)
        self.edge_weight = nnx.Linear(width, 2 * len(reaches(window)), kernel_init=nnx.initializers.zeros, rngs=rngs)

    def __call__(self, features, text, clip_scores, mask, temperature=0.025):
        return self.span_logits(features, text, clip_scores, mask, temperature).mean(axis=-1)

    def span_logits(
        self,
        features: jax.Array,
        text: jax.Array,
        clip_scores: jax.Array,
        mask: jax.Array,
        temperature: jax.Array | float = 0.025,
    ) -> jax.Array:
        """float32 [B, T, 2] of every frame to be the first, the last; -inf where `mask` is False.

        Args: as of `TemporalAgent`.
        """
        logits = super().__call__(features, text, clip_scores, mask, temperature)
        near = matches_beside(clip_scores.astype(jnp.float32), mask, self.window)
        weights = MATCH_UNIT * self.edge_weight(direction(text.astype(jnp.float32)))
        edges = jnp.einsum("bts,bse->bte", near, weights.reshape(len(text), -1, 2)) / temperature
        return logits[..., None] + edges


def reaches(window: int) -> list[int]:
    """Frames before (below 0) or after a frame that are looked at together: of a window of 12, the next 1, 3 and 6
    before it, the next 1, 2 and 5 after it."""
    before, after = window // 2, window - 1 - window // 2
    near = [[1, max(1, side // 2), max(1, side)] for side in (before, after)]
    return [*(-reach for reach in near[0]), *near[1]]


def matches_beside(clip_scores: jax.Array, mask: jax.Array, window: int) -> jax.Array:
    """Mean CLIP similarity of the frames in each of a frame's `reaches`, over the video's mean, which stands for frames
    that the video has not: clip_scores [B, T], bool mask [B, T] -> [B, T, reaches]."""
    mean = jnp.sum(clip_scores * mask, axis=1, keepdims=True) / jnp.maximum(mask.sum(axis=1, keepdims=True), 1)
    above = jnp.where(mask, clip_scores - mean, 0.0)
    T = above.shape[1]

    def beside(reach):
        number = abs(reach)
        padded = jnp.pad(above, ((0, 0), (number, number)))
        starts = range(number + 1, 2 * number + 1) if reach > 0 else range(number)
        return sum(padded[:, start : start + T] for start in starts) / number

    return jnp.stack([beside(reach) for reach in reaches(window)], axis=-1)
