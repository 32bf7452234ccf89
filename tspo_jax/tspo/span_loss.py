"""The loss of a network that predicts the first and the last frame of a span (after LSTP, arXiv 2402.16050), and the
span to learn where frames are labelled."""

import jax
import jax.numpy as jnp


def span_loss(logits: jax.Array, start: jax.Array, end: jax.Array) -> jax.Array:
    """Cross-entropy of the first frame and of the last frame, halved: a scalar.

    Args:
      logits: float [B, T, 2] of every frame to be the first, the last; -inf on padding (LSTP does not mask it).
      start, end: int [B], the first and last frame of each question's span; T or more does not count, and below 0 is 0.
    """
    log_probs = jax.nn.log_softmax(logits, axis=1)
    T = logits.shape[1]

    def mean_of(of_frames: jax.Array, target: jax.Array) -> jax.Array:
        counts = target < T
        frame = jnp.clip(target, 0, T - 1)[:, None]
        right = jnp.where(counts, jnp.take_along_axis(of_frames, frame, axis=1)[:, 0], 0.0)
        return -right.sum() / jnp.maximum(counts.sum(), 1)

    return (mean_of(log_probs[..., 0], start) + mean_of(log_probs[..., 1], end)) / 2


def longest_run(labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The first and the last frame, int [B] each, of the longest stretch of labelled frames, the first of several.

    labels: bool [B, T]; of a row without any both are T, which `span_loss` does not count.
    """
    T = labels.shape[1]

    def grow(length, is_labelled):
        length = jnp.where(is_labelled, length + 1, 0)
        return length, length

    lengths = jax.lax.scan(grow, jnp.zeros(len(labels), jnp.int32), labels.T)[1].T
    last = jnp.argmax(lengths, axis=1)
    first = last - lengths.max(axis=1) + 1
    has_some = labels.any(axis=1)
    return jnp.where(has_some, first, T), jnp.where(has_some, last, T)
