"""The temporal agent with an attention that sees the question; not in the paper.

The paper's attention looks at frames alone, so "what comes right after X" cannot reach the frames after X: which of
their neighbours X is depends on the question. Here four terms are added, all zero at first, so that a new agent
equals the paper's (`TemporalAgent`) and TSPO-0.4B can be loaded into it:

- the question scales and shifts the attention's input, feature by feature;
- every head has a learned bias for each place of a key in the window (before, at, after the frame);
- the CLIP similarity of a key frame to the question, times a learned weight per head, is added to its score;
- the largest CLIP similarity among the frames shortly before or after a frame is added to its own, times weights that
  depend on the question. Attention would have to carry that through values and mlp, which takes many more questions.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from tspo_jax.models.temporal_agent import TemporalAgent

# What a parameter of 1 adds to an attention score. At the paper's learning rate a parameter moves by 0.16 in a whole
# run, too little for a softmax; and the similarities within a video differ by hundredths only.
OFFSET_UNIT = 80.0
CLIP_UNIT = 1600.0
# What a parameter of 1 multiplies similarities by: CLIP's text features of two kinds of questions about one thing may
# differ by a twentieth of their length only, so weights that tell them apart are large.
MATCH_UNIT = 20.0


class QuestionAwareAgent(TemporalAgent):
    """Called like `TemporalAgent`; as fast, with about 2 * width**2 more parameters."""

    def __init__(self, width: int, *, num_heads: int = 8, window: int = 12, rngs: nnx.Rngs):
        super().__init__(width, num_heads=num_heads, window=window, rngs=rngs)
        self.modulation = nnx.Linear(width, 2 * width, kernel_init=nnx.initializers.zeros, rngs=rngs)
        self.offset_bias = nnx.Param(jnp.zeros((num_heads, window)))
        self.clip_weight = nnx.Param(jnp.zeros(num_heads))
        self.match_weight = nnx.Linear(width, len(spans(window)), kernel_init=nnx.initializers.zeros, rngs=rngs)

    def __call__(self, features, text, clip_scores, mask, temperature=0.025):
        logits = super().__call__(features, text, clip_scores, mask, temperature)
        weights = MATCH_UNIT * self.match_weight(direction(text.astype(jnp.float32)))
        best = best_matches(clip_scores.astype(jnp.float32), mask, self.window)
        return logits + jnp.einsum("bts,bs->bt", best, weights) / temperature

    def _attention(self, y, inner, text, clip_scores, is_valid):
        scale, shift = jnp.split(self.modulation(direction(text))[:, None], 2, axis=-1)
        return super()._attention(
            y * (1 + scale) + shift,
            inner,
            text,
            clip_scores,
            is_valid,
            offset_bias=OFFSET_UNIT * self.offset_bias[...],
            key_bias=CLIP_UNIT * clip_scores[..., None] * self.clip_weight[...],
        )


def spans(window: int) -> list[tuple[int, int]]:
    """(frames before, frames after) of the stretches that a frame looks for the question in: of a window of 12, itself,
    up to 1, 3 and 6 before it, up to 1, 2 and 5 after it."""
    before, after = window // 2, window - 1 - window // 2
    near = [[min(1, side), side // 2, side] for side in (before, after)]
    return [(0, 0), *((reach, 0) for reach in near[0]), *((0, reach) for reach in near[1])]


def best_matches(clip_scores: jax.Array, mask: jax.Array, window: int) -> jax.Array:
    """The largest CLIP similarity in each of a frame's `spans`: clip_scores [B, T], bool mask [B, T] -> [B, T, spans].

    0 on padding.
    """
    scores = jnp.where(mask, clip_scores, -jnp.inf)

    def largest(before, after):
        return jax.lax.reduce_window(
            scores, -jnp.inf, jax.lax.max, (1, before + 1 + after), (1, 1), ((0, 0), (before, after))
        )

    best = jnp.stack([largest(*span) for span in spans(window)], axis=-1)
    return jnp.where(mask[..., None], best, 0.0)


def direction(text: jax.Array) -> jax.Array:
    """Text features [B, D] of length 1."""
    return text / (jnp.linalg.norm(text, axis=-1, keepdims=True) + 1e-6)
