"""TSPO's temporal agent: scores every candidate frame of a video for a question (paper section 3.2)."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from tspo_jax.models.layers import Linear, Mlp

CHUNK = 4096  # frames scored at a time: bounds memory on hour-long videos, never reached in training


def positional_encoding(index: jax.Array, num_frames: jax.Array, width: int) -> jax.Array:
    """Sinusoids of i / T, as the original trains them (T the true number of frames, so i / T is in [0, 1)).

    index int [..., n], num_frames int [...] -> float32 [..., n, width]; even channels sine, odd channels cosine.
    """
    position = index.astype(jnp.float32) / num_frames[..., None].astype(jnp.float32)
    frequency = jnp.exp(jnp.arange(0, width, 2, dtype=jnp.float32) * (-math.log(10000.0) / width))
    angle = position[..., None] * frequency
    return jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=-1).reshape(*angle.shape[:-1], width)


def window_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    key_is_valid: jax.Array,
    window: int,
    offset_bias: jax.Array | None = None,
    key_bias: jax.Array | None = None,
) -> jax.Array:
    """Attention of each frame to `window` frames around it: O(n * window) time and memory.

    Queries are cut into blocks of `window`; the keys that a block can see lie in two consecutive blocks, so the scores
    are [n / window, window, 2 * window] and never n x n.

    Args:
      q: [B, n, H, d].
      k, v: [B, window - 1 + n, H, d]: query j sees keys j ... j + window - 1, of which j + window // 2 is itself
        (one more frame before than after when the window is even).
      key_is_valid: bool [B, window - 1 + n].
      offset_bias: [H, window], added to the scores by the key's place in the query's window; None = nothing.
      key_bias: [B, window - 1 + n, H], added to the scores of a key; None = nothing.
    Returns:
      [B, n, H * d].
    """
    B, n, H, d = q.shape
    blocks = -(-n // window)
    q = jnp.pad(q, ((0, 0), (0, blocks * window - n), (0, 0), (0, 0))).reshape(B, blocks, window, H, d)

    def two_blocks(x):
        pad = (blocks + 1) * window - x.shape[1]
        x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
        x = x.reshape(B, blocks + 1, window, *x.shape[2:])
        return jnp.concatenate([x[:, :-1], x[:, 1:]], axis=2)  # [B, blocks, 2 * window, ...]

    offset = jnp.arange(2 * window) - jnp.arange(window)[:, None]
    seen = (offset >= 0) & (offset < window) & two_blocks(key_is_valid)[:, :, None, None, :]
    scores = jnp.einsum("bnqhd,bnkhd->bnhqk", q, two_blocks(k)) / math.sqrt(d)
    if offset_bias is not None:
        scores += offset_bias[:, jnp.clip(offset, 0, window - 1)]
    if key_bias is not None:
        scores += jnp.swapaxes(two_blocks(key_bias), 2, 3)[:, :, :, None]
    weights = jax.nn.softmax(jnp.where(seen, scores, -1e6), axis=-1)
    out = jnp.einsum("bnhqk,bnkhd->bnqhd", weights, two_blocks(v))
    return out.reshape(B, blocks * window, H * d)[:, :n]


class WindowSelfAttention(nnx.Module):
    """The original's key names. `ffn_o` is in every checkpoint but never applied, so it gets no gradient."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.Self_q, self.Self_k, self.Self_v, self.ffn_o = (Linear(width, width, rngs=rngs) for _ in range(4))


class TemporalAgent(nnx.Module):
    """3.5 M parameters at width 768. Initial weights are N(0, 0.02^2) with zero biases, as in the original's training:
    then mlp(...) is small and the first logits are about 2 * cosine / tau."""

    def __init__(self, width: int, *, num_heads: int = 8, window: int = 12, rngs: nnx.Rngs):
        if width % num_heads:
            raise ValueError(f"the agent's {num_heads} heads do not divide its width {width}")
        if window < 1:
            raise ValueError(f"window is {window}; it must be at least 1 frame")
        self.temporal = WindowSelfAttention(width, rngs=rngs)
        self.mlp = Mlp(width, width, width, "relu", rngs=rngs)
        self.num_heads = num_heads
        self.window = window

    def __call__(
        self,
        features: jax.Array,
        text: jax.Array,
        clip_scores: jax.Array,
        mask: jax.Array,
        temperature: jax.Array | float = 0.025,
    ) -> jax.Array:
        """Logits float32 [B, T] over the candidate frames; -inf where `mask` is False.

        Args:
          features: raw CLIP image features [B, T, D].
          text: raw CLIP text feature of the question [B, D].
          clip_scores: their cosine [B, T].
          mask: bool [B, T], True on the video's frames, which come first (right padding).
          temperature: the paper's tau.
        """
        features, text, clip_scores = (x.astype(jnp.float32) for x in (features, text, clip_scores))
        B, T, _ = features.shape
        before, after = self.window // 2, self.window - 1 - self.window // 2
        num_frames = jnp.maximum(mask.sum(1), 1)  # a row without frames must not turn gradients into NaN
        chunk = min(CHUNK, T)
        num_chunks = -(-T // chunk)
        total = num_chunks * chunk
        pad = (before, after + total - T)
        features = jnp.pad(features, ((0, 0), pad, (0, 0)))
        valid, key_scores = (jnp.pad(x, ((0, 0), pad)) for x in (mask, clip_scores))

        def score(start):
            """Similarity of the agent's features to the question for frames start ... start + chunk - 1."""
            x, is_valid, scores = (
                jax.lax.dynamic_slice_in_dim(a, start, chunk + before + after, axis=1)
                for a in (features, valid, key_scores)
            )
            z = self._events(x, text, scores, is_valid, start - before, num_frames)
            # Bounded below, because the gradient of a norm is undefined at zero, where a padded frame may lie.
            z_norm = jnp.sqrt(jnp.maximum(jnp.sum(z * z, axis=-1), 1e-30))
            norms = z_norm * jnp.linalg.norm(text, axis=-1, keepdims=True)
            return jnp.einsum("btd,bd->bt", z, text) / (norms + 1e-6)

        if num_chunks == 1:
            similarity = score(0)
        else:
            similarity = jax.lax.map(score, jnp.arange(num_chunks) * chunk)  # [chunks, B, chunk]
            similarity = jnp.moveaxis(similarity, 0, 1).reshape(B, total)[:, :T]
        return jnp.where(mask, (similarity + clip_scores) / temperature, -jnp.inf)

    def event_features(
        self, features: jax.Array, text: jax.Array, clip_scores: jax.Array, mask: jax.Array
    ) -> jax.Array:
        """The features [B, T, D] that are compared with the question: attention's output through the mlp, plus the
        CLIP features without positions."""
        before, after = self.window // 2, self.window - 1 - self.window // 2
        features = jnp.pad(features.astype(jnp.float32), ((0, 0), (before, after), (0, 0)))
        is_valid, clip_scores = (jnp.pad(x, ((0, 0), (before, after))) for x in (mask, clip_scores))
        return self._events(features, text, clip_scores, is_valid, -before, jnp.maximum(mask.sum(1), 1))

    def _events(self, x, text, clip_scores, is_valid, first_index, num_frames):
        """x [B, before + n + after, D], clip_scores and is_valid likewise; only the inner n are computed."""
        B, length, D = x.shape
        before, n = self.window // 2, length - self.window + 1
        index = jnp.broadcast_to(first_index + jnp.arange(length), (B, length))
        y = x + positional_encoding(index, num_frames, D)
        inner = slice(before, before + n)
        return self.mlp(self._attention(y, inner, text, clip_scores, is_valid)) + x[:, inner]

    def _attention(self, y, inner, text, clip_scores, is_valid, **biases):
        """[B, n, D] for the inner frames of y. Frames alone decide: the paper's attention does not see the question."""
        # The keys' bias shifts all scores of a query alike, so it has no effect. Left out, its gradient is zero and not
        # rounding, which Adam would blow up to full steps that differ from mesh to mesh.
        keys = y @ self.temporal.Self_k.kernel[...]
        q, k, v = self.temporal.Self_q(y[:, inner]), keys, self.temporal.Self_v(y)
        q, k, v = (a.reshape(*a.shape[:2], self.num_heads, -1) for a in (q, k, v))
        return window_attention(q, k, v, is_valid, self.window, **biases)
