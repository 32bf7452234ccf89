import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tspo_jax.models.token_merge import first_members, largest_merge, match, members, merge, merge_tokens


def decide(case, metric):
    shared = case["merging_type"] == "frame"
    return match(metric, case["r"], shared=shared, class_token=case["class_token"])


def test_golden(golden):
    data = np.load(golden / "testa_merge.npz")
    for i, case in enumerate(json.loads(str(data["meta"]))):
        x, metric = data[f"case{i}/x"], data[f"case{i}/metric"]
        size = data.get(f"case{i}/size")
        r = largest_merge(x.shape[-2], case["class_token"]) if case["r"] > case["r_effective"] else case["r"]
        assert r == case["r_effective"], case["what"]

        @jax.jit
        def run(x, size, metric, cotangent, case=case):
            decision = decide(case, metric)
            (merged, merged_size), gradient_of = jax.vjp(lambda x, size: merge(x, size, decision), x, size)
            zero = None if merged_size is None else jnp.zeros_like(merged_size)
            index = jnp.broadcast_to(jnp.arange(x.shape[-2]), x.shape[:-1])
            found = members(decision, x.shape[-2]), first_members(index, decision)
            return decision, merged, merged_size, gradient_of((cotangent, zero)), found

        decision, merged, merged_size, (grad_x, grad_size), (is_member, first_found) = run(
            x, size, metric, data[f"case{i}/cotangent"]
        )
        found = data[f"case{i}/merged"]
        np.testing.assert_allclose(merged, found, atol=1e-6, err_msg=case["what"])
        np.testing.assert_array_equal(
            merged_size if merged_size is not None else np.ones_like(found[..., :1]), data[f"case{i}/merged_size"]
        )
        np.testing.assert_allclose(grad_x, data[f"case{i}/grad_x"], atol=1e-6, err_msg=case["what"])
        if f"case{i}/grad_size" in data:
            np.testing.assert_allclose(grad_size, data[f"case{i}/grad_size"], atol=1e-6, err_msg=case["what"])
        source = data[f"case{i}/source"].astype(bool)
        np.testing.assert_array_equal(np.broadcast_to(is_member, source.shape), source)
        if decision is None:
            assert case["r_effective"] == 0
            continue
        for ours, theirs in (("kept", "kept_a"), ("merged", "merged_a"), ("partner", "partner_b")):
            theirs = data[f"case{i}/{theirs}"]
            np.testing.assert_array_equal(np.broadcast_to(getattr(decision, ours), theirs.shape), theirs, case["what"])
        first = np.where(source, np.arange(x.shape[-2]), x.shape[-2]).min(-1)
        np.testing.assert_array_equal(first_found, first)


def test_sizes_and_order():
    """Sizes sum to the tokens that there were, round after round; kept tokens in order where that is asked for."""
    x = jax.random.normal(jax.random.key(0), (2, 3, 16, 5))
    index = jnp.broadcast_to(jnp.arange(16), x.shape[:-1])

    @jax.jit
    def rounds(y, index):
        sizes, all_kept = None, []
        for r in (5, 3, 4):
            decision = match(y, r, shared=False, in_order=True)
            all_kept.append(decision.kept)
            index = first_members(index, decision)
            y, sizes = merge(y, sizes, decision)
        return y, sizes, index, all_kept

    y, sizes, index, all_kept = rounds(x, index)
    assert all((np.diff(kept) > 0).all() for kept in all_kept)
    assert y.shape == (2, 3, 4, 5) and index.shape == (2, 3, 4)
    np.testing.assert_allclose(sizes.sum((-2, -1)), 16)
    np.testing.assert_allclose((y * sizes).sum(-2), x.sum(-2), atol=1e-5)


@pytest.mark.parametrize("vote", ["mode", "min", "mean"])
def test_frames_shown_twice(vote):
    """Of K frames that are each shown twice, K are merged away and the K distinct ones are left."""
    distinct = jax.random.normal(jax.random.key(1), (4, 6, 8))
    y, sizes = merge_tokens(twice := jnp.repeat(distinct, 2, axis=1), twice, None, 6, shared=True, vote=vote)
    np.testing.assert_allclose(y, distinct, atol=1e-6)
    np.testing.assert_array_equal(sizes, 2)


def test_a_needle_frame_stays():
    """A frame unlike the still rest is what is left of A."""
    frames = jnp.tile(jax.random.normal(jax.random.key(2), (1, 1, 8)), (5, 12, 1))
    for needle in (4, 7):
        shown = frames.at[:, needle].set(jax.random.normal(jax.random.key(3), (5, 8)))
        y, sizes = merge_tokens(shown, shown, None, 5, shared=True, vote="min")
        alone = jnp.argmin(jnp.abs(y - shown[:, needle][:, None]).sum((0, 2)))
        np.testing.assert_allclose(y[:, alone], shown[:, needle], atol=1e-6)
        assert (sizes[:, alone] == 1).all()


def test_votes_differ():
    """Frames 0 and 1 are alike to .6 in all three patches, frames 2 and 3 to 1, 1 and 0: the least alike patch speaks
    for the first pair, the average (.67) for the second."""
    tilted = jnp.array([[1.0, 0, 0], [0.6, 0.8, 0], [0, 0, 1], [0, 0, 1]])
    tilted = jnp.stack([tilted, tilted, tilted.at[3].set(jnp.array([0, 0.995, -0.1]))])
    assert match(tilted, 1, shared=True, vote="min").merged.item() == 0
    assert match(tilted, 1, shared=True, vote="mean").merged.item() == 1
    with pytest.raises(ValueError, match="vote is 'median'"):
        match(tilted, 1, shared=True, vote="median")


def test_no_direction_and_low_precision():
    """Zero vectors give no nan; bfloat16 features keep sizes and sums in float32."""
    x = jnp.zeros((2, 6, 4)).at[:, 3:].set(1.0).astype(jnp.bfloat16)
    y, sizes = merge_tokens(x, x, None, 3, shared=False)
    assert y.dtype == jnp.bfloat16 and sizes.dtype == jnp.float32 and jnp.isfinite(y).all()


def test_decision_of_another_axis():
    decision = match(jnp.ones((1, 8, 2)), 2, shared=False)
    with pytest.raises(ValueError, match="6 tokens, but the decision is about 8"):
        merge(jnp.ones((1, 6, 2)), None, decision)


def test_one_compilation():
    compiled = jax.jit(partial(merge_tokens, r=3, shared=True))
    for seed in range(3):
        x = jax.random.normal(jax.random.key(seed), (2, 4, 8, 5))
        compiled(x, x, None)
    assert compiled._cache_size() == 1
