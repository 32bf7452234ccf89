"""The benchmark of merging: what it drops in place of merging, and its table."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.merging_toy import keep_random, table
from tspo_jax.models.token_budget import Budget, merge_visual


@pytest.mark.slow
def test_random_tokens_are_kept_in_their_order():
    """Shapes are those of merging; every token that is kept stands behind its frame and place, none twice."""
    P, K, L = 3, 8, 4
    tokens = jnp.arange(P * K * L, dtype=jnp.float32).reshape(P, K, L, 1)
    for budget in (Budget(4, 0), Budget(0, 2), Budget(3, 1)):
        kept = keep_random(tokens, budget)
        assert jax.tree.map(jnp.shape, kept) == jax.tree.map(jnp.shape, merge_visual(tokens, budget))
        assert (np.diff(kept.frames) > 0).all() and (np.diff(kept.places) > 0).all()
        own = np.arange(P)[:, None, None] * K * L + kept.frames[..., None] * L + kept.places
        np.testing.assert_array_equal(kept.tokens[..., 0], own)
    assert len(np.unique(keep_random(tokens, Budget(4, 0)).frames, axis=0)) > 1  # each set's own


def test_table():
    videos = [f"{i // 2}" for i in range(24)]
    rows = [
        {"picks": "uniform", "arm": "plain", "tokens": 48, "right": [0, 1] * 12},
        {"picks": "uniform", "arm": "frames", "tokens": 48, "right": [1, 1] * 12},
        {"picks": "uniform", "arm": "random_frames", "tokens": 48, "right": [0, 0] * 12},
    ]
    plain, merged, dropped = table(rows, videos).splitlines()[2:]
    assert plain == "| uniform | K frames | 48 | 0.500 [0.500, 0.500] |  |  |"
    gains = "+0.500 [+0.500, +0.500] | +1.000 [+1.000, +1.000] |"
    assert merged == f"| uniform | 2 K, frames merged | 48 | 1.000 [1.000, 1.000] | {gains}"
    assert dropped.endswith("| -0.500 [-0.500, -0.500] |  |")
    with pytest.raises(ValueError):
        table(rows, videos[:3])
