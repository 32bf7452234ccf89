"""Fewer visual tokens in front of a language model: alike frames of a set, then alike patches of each frame, are merged
(models/token_merge.py), and what is left is put back into the order of time and of the raster.

TESTA merges inside an encoder that is trained with it; here nothing is trained, and a language model reads positions
from the order of its tokens, so the order is restored. There is no published result for this use: docs/tokens.md.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from tspo_jax.models.token_merge import first_members, largest_merge, match, merge

VOTE = "mean"  # how the patches agree on how alike two frames are; does not hang on how a last bit was rounded


class Budget(NamedTuple):
    """What is left of K frames of L patches: K - frames, and L - patches of each."""

    frames: int
    patches: int

    @classmethod
    def of(cls, numbers: tuple[int, ...]) -> "Budget":
        """() merges nothing. Raises ValueError for anything but two numbers from 0 on."""
        if not numbers:
            return cls(0, 0)
        if len(numbers) != 2 or any(not isinstance(n, int) or n < 0 for n in numbers):
            raise ValueError(f"merge is {tuple(numbers)}, not how many frames and how many patches of each to merge")
        return cls(*numbers)

    def left(self, num_frames: int, num_patches: int) -> tuple[int, int]:
        """Frames, and patches of each. Raises ValueError where more than half of either would go."""
        for name, r, n in (("frames", self.frames, num_frames), ("patches", self.patches, num_patches)):
            if r > largest_merge(n):
                raise ValueError(f"merge would remove {r} of {n} {name}; at most half of them, {n // 2}, can be merged")
        return num_frames - self.frames, num_patches - self.patches


class Merged(NamedTuple):
    """Visual tokens after merging.

    Attributes:
      tokens: [..., K', L', W], frames by time and patches by raster.
      frames: int [..., K'], the first frame that each one is made of.
      places: int [..., K', L'], the first place in the raster that each token is made of.
    """

    tokens: jax.Array
    frames: jax.Array
    places: jax.Array


def merge_visual(tokens: jax.Array, budget: Budget) -> Merged:
    """Visual tokens [..., K, L, W] of frame sets, compared by themselves."""
    *lead, K, L, _ = tokens.shape
    budget.left(K, L)
    by_patch = jnp.swapaxes(tokens, -2, -3)  # [..., L, K, W]
    decision = match(by_patch, budget.frames, shared=True, in_order=True, vote=VOTE)
    by_patch, sizes = merge(by_patch, None, decision)
    frames = first_members(jnp.broadcast_to(jnp.arange(K), (*lead, 1, K)), decision)[..., 0, :]
    tokens = jnp.swapaxes(by_patch, -2, -3)
    sizes = None if sizes is None else jnp.swapaxes(sizes, -2, -3)

    decision = match(tokens, budget.patches, shared=False, in_order=True)
    tokens, _ = merge(tokens, sizes, decision)
    places = first_members(jnp.broadcast_to(jnp.arange(L), (*lead, frames.shape[-1], L)), decision)

    order = jnp.argsort(frames, axis=-1)
    tokens = jnp.take_along_axis(tokens, order[..., None, None], axis=-3)
    frames, places = jnp.take_along_axis(frames, order, axis=-1), jnp.take_along_axis(places, order[..., None], axis=-2)
    order = jnp.argsort(places, axis=-1)
    tokens = jnp.take_along_axis(tokens, order[..., None], axis=-2)
    return Merged(tokens, frames, jnp.take_along_axis(places, order, axis=-1))


def rows_closed(tokens: jax.Array, places: jax.Array, newline: jax.Array, side: int) -> jax.Array:
    """Tokens [..., K, L, W] at `places` of a raster of `side` x `side`, with a newline behind each row of a frame, also
    of those that nothing is left of: [..., K * (L + side), W]."""
    *lead, K, L, W = tokens.shape
    row, column = places // side, places % side
    key = row * (side + 1) + column
    ends = jnp.broadcast_to(jnp.arange(side) * (side + 1) + side, (*lead, K, side))
    order = jnp.argsort(jnp.concatenate([key, ends], axis=-1), axis=-1, stable=True)
    newlines = jnp.broadcast_to(newline, (*lead, K, side, W))
    both = jnp.concatenate([tokens, newlines], axis=-2)
    return jnp.take_along_axis(both, order[..., None], axis=-2).reshape(*lead, K * (L + side), W)
