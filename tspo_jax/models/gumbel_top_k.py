"""Drawing k of T without replacement in proportion to softmax(logits): the Gumbel-top-k trick (arXiv 1903.06059).

Shared by the policy that draws frames and the one that draws the memories of a stream.
"""

import jax
import jax.numpy as jnp


def gumbel_noise(keys: jax.Array, group_size: int, num_frames: int) -> jax.Array:
    """Gumbel noise float32 [B,G,T] from keys [B]; more padding leaves the noise of a frame as it is."""
    # Threefry's bits depend on the flat position, so frames go first for padding to come last.
    noise = jax.vmap(lambda key: jax.random.gumbel(key, (num_frames, group_size)))(keys)
    return noise.swapaxes(1, 2)


def perturbed_top_k(logits: jax.Array, noise: jax.Array, k: int) -> jax.Array:
    """The k frames with the largest logit + noise, largest first.

    With Gumbel noise this is a draw of k frames without replacement from softmax(logits), in the order of
    drawing (Plackett-Luce).

    Args:
      logits: [B,T], -inf on padding.
      noise: [B,G,T].
      k: frames per draw, at most the number of frames that are no padding (`check_candidates`).

    Returns: int32 [B,G,K] in the order of drawing.
    """
    return jax.lax.top_k(logits[:, None] + noise, k)[1]


def straight_through_top_k(
    logits: jax.Array, noise: jax.Array | None, k: int, gradient_scale: float = 1.0
) -> tuple[jax.Array, jax.Array]:
    """`perturbed_top_k` with one draw a row, as one-hot rows that gradients flow through.

    Forwards a row is one-hot; backwards it is the softmax that it was drawn from, over what the rows before left
    (a straight-through estimator). Rows stand in the order of time; where fewer than k are no padding, the rows that
    are left come last and are all zero.

    Args:
      logits: [B,T], -inf on padding.
      noise: [B,T] Gumbel noise; None = the k largest (evaluation).
      k: rows.
      gradient_scale: factor of the gradient to the logits.

    Returns: weights float32 [B,k,T], and the picks int32 [B,k] in the order of time, T where a row is zero.
    """
    B, T = logits.shape
    k_there = min(k, T)
    scores = logits * gradient_scale + jax.lax.stop_gradient(logits * (1 - gradient_scale))
    drawn = perturbed_top_k(
        jax.lax.stop_gradient(logits), jnp.zeros((B, 1, T)) if noise is None else noise[:, None], k_there
    )[:, 0]
    drawn = jnp.pad(drawn, ((0, 0), (0, k - k_there)))
    is_there = jnp.arange(k) < jnp.isfinite(logits).sum(-1, keepdims=True)
    one_hot = jax.nn.one_hot(drawn, T) * is_there[..., None]
    taken = jnp.cumsum(one_hot, axis=1) - one_hot  # by the rows before
    # A finite floor in place of -inf: where nothing is left, the softmax and its gradient stay finite.
    left = jnp.where((taken > 0) | ~jnp.isfinite(scores)[:, None], jnp.finfo(scores.dtype).min, scores[:, None])
    soft = jax.nn.softmax(left, axis=-1) * is_there[..., None]
    weights = one_hot + soft - jax.lax.stop_gradient(soft)
    picks = jnp.where(is_there, drawn, T)
    order = jnp.argsort(picks, axis=-1)
    return jnp.take_along_axis(weights, order[..., None], axis=1), jnp.take_along_axis(picks, order, axis=1)
