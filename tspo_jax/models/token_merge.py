"""Merging of alike tokens: the aggregation operator of TESTA (arXiv 2310.19060, sections 3.1 to 3.3).

Of the `t` tokens of an axis every other one (set A: 0, 2, ...) may be merged into its most alike token of the rest (set
B: 1, 3, ...); the `r` best pairs are. `match` decides, without gradient, and `merge` applies the decision to features
and to sizes (how many original tokens each one stands for). All shapes are static.

Two uses: *patch* merge (t = patches of a frame, every frame decides for itself) and *frame* merge (t = frames, all
patches share one decision, by a vote).
"""

import jax
import jax.numpy as jnp
from flax import struct

# How the patches of a frame merge agree on how alike two frames are: `mode` is the original's (of floats, which hardly
# ever coincide: then it is the least alike patch), `min` and `mean` do not depend on how a last bit was rounded.
VOTES = ("mode", "min", "mean")
_EPSILON = 1e-12  # added to nothing but zero vectors, which have no direction


@struct.dataclass
class Match:
    """A decision for [..., n, t] tokens; n is 1 where it is shared.

    Attributes:
      kept: int [..., n, ceil(t/2) - r], indices in A that stay, in the order of the output.
      merged: int [..., n, r], indices in A that are merged away, the most alike first.
      partner: int [..., n, r], the index in B that each of them is merged into.
      num_tokens: t.
    """

    kept: jax.Array
    merged: jax.Array
    partner: jax.Array
    num_tokens: int = struct.field(pytree_node=False)


def largest_merge(num_tokens: int, class_token: bool = False) -> int:
    """How many of `num_tokens` one merge can remove."""
    return (num_tokens - class_token) // 2


def match(
    metric: jax.Array,
    r: int,
    *,
    shared: bool,
    class_token: bool = False,
    in_order: bool | None = None,
    vote: str = "mode",
) -> Match | None:
    """Which tokens are merged.

    Args:
      metric: [..., n, t, d], compared by cosine; no gradient flows through it.
      r: tokens to remove; more than `largest_merge` is cut down to it.
      shared: True for a frame merge (all n decide together), False for a patch merge.
      class_token: token 0 stays as it is. A frame merge has no such token; there the flag lowers the largest r only.
      in_order: kept tokens keep their order; None = as the original: in a patch merge without class token they come by
        descending similarity, else in order.
      vote: one of VOTES, of a shared decision.
    Returns: None where nothing is merged.
    """
    if vote not in VOTES:
        raise ValueError(f"vote is {vote!r}, none of {', '.join(VOTES)}")
    num_tokens = metric.shape[-2]
    r = min(r, largest_merge(num_tokens, class_token))
    if r <= 0:
        return None
    metric = jax.lax.stop_gradient(metric).astype(jnp.float32)
    metric = metric / jnp.maximum(jnp.linalg.norm(metric, axis=-1, keepdims=True), _EPSILON)
    similarity = jnp.einsum("...ad,...bd->...ab", metric[..., ::2, :], metric[..., 1::2, :], precision="highest")
    if class_token and not shared:
        similarity = similarity.at[..., 0, :].set(-jnp.inf)
    value, partner = similarity.max(-1), similarity.argmax(-1)  # [..., n, |A|]
    if shared:
        partner = _mode_of_indices(partner, similarity.shape[-1])
        value = {"mode": _mode_of_values, "min": _min_over_n, "mean": _mean_over_n}[vote](value)
    order = jnp.argsort(-value, axis=-1, stable=True)  # equal ones: lower index first
    merged, kept = order[..., :r], order[..., r:]
    if in_order if in_order is not None else (shared or class_token):
        kept = jnp.sort(kept, axis=-1)
    return Match(kept, merged, jnp.take_along_axis(partner, merged, axis=-1), num_tokens)


def _min_over_n(value: jax.Array) -> jax.Array:
    return value.min(-2, keepdims=True)


def _mean_over_n(value: jax.Array) -> jax.Array:
    return value.mean(-2, keepdims=True)


def _mode_of_indices(index: jax.Array, size: int) -> jax.Array:
    """The commonest of [..., n, a] over n, the smallest of several: [..., 1, a]."""
    return jax.nn.one_hot(index, size, dtype=jnp.int32).sum(-3).argmax(-1)[..., None, :]


def _mode_of_values(value: jax.Array) -> jax.Array:
    """The commonest of [..., n, a] over n, the smallest of several: [..., 1, a]."""
    value = jnp.sort(jnp.swapaxes(value, -1, -2), axis=-1)
    place = jnp.arange(value.shape[-1])
    is_new = jnp.concatenate([jnp.ones_like(value[..., :1], bool), value[..., 1:] != value[..., :-1]], axis=-1)
    start = jax.lax.cummax(jnp.where(is_new, place, 0), axis=value.ndim - 1)
    # The run that is longest first: its last element stands at the first maximum of the place within a run.
    best = jnp.argmax(place - start, axis=-1, keepdims=True)
    return jnp.swapaxes(jnp.take_along_axis(value, best, axis=-1), -1, -2)


def merge(x: jax.Array, sizes: jax.Array | None, decision: Match | None) -> tuple[jax.Array, jax.Array | None]:
    """Features as size-weighted means of what was merged, and the new sizes.

    Args:
      x: [..., n, t, c].
      sizes: float32 [..., n, t, 1]; None = all ones.
      decision: of `match`; None changes nothing.
    Returns: [..., n, t - r, c] (kept A, then B) of x's dtype; float32 [..., n, t - r, 1].
    """
    if decision is None:
        return x, sizes
    if x.shape[-2] != decision.num_tokens:
        raise ValueError(f"{x.shape[-2]} tokens, but the decision is about {decision.num_tokens}")
    if sizes is None:
        sizes = jnp.ones((*x.shape[:-1], 1), jnp.float32)
    total = _gather_add(sizes, decision)
    summed = _gather_add(x.astype(jnp.float32) * sizes, decision)
    return (summed / total).astype(x.dtype), total


def _gather_add(x: jax.Array, decision: Match) -> jax.Array:
    a, b = x[..., ::2, :], x[..., 1::2, :]
    # A product with a 0/1 matrix instead of a scatter: as exact, and fast on matrix units.
    into = jax.nn.one_hot(decision.partner, b.shape[-2], dtype=x.dtype)
    into = jnp.broadcast_to(into, (*x.shape[:-2], *into.shape[-2:]))
    added = jnp.einsum("...rb,...rc->...bc", into, _take(a, decision.merged), precision="highest")
    return jnp.concatenate([_take(a, decision.kept), b + added], axis=-2)


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
    """x [..., n, t, c] at index [..., n or 1, k] of t."""
    index = jnp.broadcast_to(index, (*x.shape[:-2], index.shape[-1]))
    return jnp.take_along_axis(x, index[..., None], axis=-2)


def merge_tokens(
    x: jax.Array,
    metric: jax.Array,
    sizes: jax.Array | None,
    r: int,
    *,
    shared: bool,
    class_token: bool = False,
    in_order: bool | None = None,
    vote: str = "mode",
) -> tuple[jax.Array, jax.Array | None]:
    """`match` by `metric`, then `merge`."""
    decision = match(metric, r, shared=shared, class_token=class_token, in_order=in_order, vote=vote)
    return merge(x, sizes, decision)


def first_members(index: jax.Array, decision: Match | None) -> jax.Array:
    """The smallest `index` int [..., n, t] of what each output token is made of: int [..., n, t - r]."""
    if decision is None:
        return index
    a, b = index[..., ::2], index[..., 1::2]
    kept, merged = (_take(a[..., None], part)[..., 0] for part in (decision.kept, decision.merged))
    goes_in = jax.nn.one_hot(decision.partner, b.shape[-1], dtype=bool)  # [..., n, r, |B|]
    largest = jnp.iinfo(index.dtype).max
    joined = jnp.where(goes_in, merged[..., None], largest).min(-2)
    return jnp.concatenate([kept, jnp.minimum(b, joined)], axis=-1)


def members(decision: Match | None, num_tokens: int) -> jax.Array:
    """Which input tokens are in which output: bool [..., n, t - r, t]."""
    one = jnp.eye(num_tokens)
    if decision is None:
        return one.astype(bool)
    lead = decision.kept.shape[:-1]
    return _gather_add(jnp.broadcast_to(one, (*lead, *one.shape)), decision) > 0
