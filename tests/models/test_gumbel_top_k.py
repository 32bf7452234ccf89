import itertools

import jax
import jax.numpy as jnp
import numpy as np

from tspo_jax.models.gumbel_top_k import gumbel_noise, perturbed_top_k, straight_through_top_k

LOGITS = jnp.array([[0.5, -jnp.inf, 2.0, 1.0, -1.0], [3.0, -jnp.inf, -jnp.inf, -jnp.inf, -jnp.inf]])


def test_rows_are_one_hot_distinct_and_in_order_of_time():
    noise = gumbel_noise(jax.random.split(jax.random.key(0), 2), 1, 5)[:, 0]
    weights, picks = straight_through_top_k(LOGITS, noise, 3)
    np.testing.assert_allclose(weights[0].sum(-1), 1, atol=1e-6)
    np.testing.assert_allclose(np.sort(weights[0]).max(-1), 1, atol=1e-6)
    drawn = np.asarray(perturbed_top_k(LOGITS, noise[:, None], 3))[0, 0]
    assert picks[0].tolist() == sorted(drawn) and len(set(picks[0].tolist())) == 3 and 1 not in picks[0]
    np.testing.assert_array_equal(np.argmax(weights[0], -1), picks[0])
    assert picks[1].tolist() == [0, 5, 5] and np.all(weights[1, 1:] == 0)


def test_no_noise_takes_the_largest_and_repeats():
    weights, picks = straight_through_top_k(LOGITS, None, 2)
    assert picks.tolist() == [[2, 3], [0, 5]]
    again, _ = straight_through_top_k(LOGITS, None, 2)
    np.testing.assert_array_equal(weights, again)
    _, more = straight_through_top_k(LOGITS, None, 7)
    assert more[0].tolist() == [0, 2, 3, 4, 5, 5, 5]


def test_gradient_is_that_of_the_softmaxes_drawn_from():
    values = jnp.arange(5.0) ** 2

    def soft(logits, drawn):
        """The same sum with the softmax of each draw in place of its one-hot row."""
        left, total = logits, 0.0
        for row, pick in enumerate(drawn):
            total += (row + 1) * jax.nn.softmax(left) @ values
            left = left.at[pick].set(-jnp.inf)
        return total

    def hard(logits, scale=1.0):
        weights, picks = straight_through_top_k(logits[None], None, 2, scale)
        rows = jnp.where(picks[0] == 2, 1, 2)  # the first draw, 2, counts once, the second, 3, twice
        return jnp.sum(rows * (weights[0] @ values))

    logits = LOGITS[0].at[1].set(0.1)
    expected = jax.grad(soft)(logits, (2, 3))
    np.testing.assert_allclose(jax.grad(hard)(logits), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(jax.grad(hard)(logits, 0.1), 0.1 * expected, rtol=1e-5, atol=1e-6)
    assert hard(logits, 0.1) == hard(logits)
    padded = jax.grad(lambda x: straight_through_top_k(x, None, 3)[0][..., 0].sum())(LOGITS)
    assert np.isfinite(padded).all()


def test_frequencies_are_those_of_draws_without_replacement():
    num, k = 20_000, 2
    noise = gumbel_noise(jax.random.split(jax.random.key(1), 1), num, 4)[0]
    for logits in (jnp.zeros(4), jnp.array([1.0, 0.0, -1.0, 0.5])):
        _, picks = straight_through_top_k(jnp.broadcast_to(logits, (num, 4)), noise, k)
        found = np.bincount(np.asarray(picks).ravel(), minlength=4) / num
        p, expected = np.asarray(jax.nn.softmax(logits)), np.zeros(4)
        for order in itertools.permutations(range(4), k):
            chance = p[order[0]] * p[order[1]] / (1 - p[order[0]])
            expected[list(order)] += chance
        np.testing.assert_allclose(found, expected, atol=0.015)
        if not logits.any():
            np.testing.assert_allclose(expected, k / 4)
