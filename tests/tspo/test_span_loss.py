import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tspo_jax.tspo.span_loss import span_loss


def test_golden_loss_and_gradient(golden):
    data = np.load(golden / "lstp_span.npz")
    value, gradient = jax.value_and_grad(span_loss)(data["loss/logits"], data["loss/start"], data["loss/end"])
    assert value == pytest.approx(float(data["loss/value"]), abs=1e-6)
    np.testing.assert_allclose(gradient, data["loss/grad"], atol=1e-6)


def test_padding_is_masked():
    logits = np.random.default_rng(0).normal(size=(2, 6, 2)).astype(np.float32)
    padded = np.concatenate([logits, np.full((2, 3, 2), -np.inf, np.float32)], axis=1)
    start, end = np.array([0, 2]), np.array([3, 5])
    np.testing.assert_allclose(span_loss(padded, start, end), span_loss(logits, start, end), rtol=1e-6)
    assert np.isfinite(jax.grad(span_loss)(jnp.asarray(padded), start, end)).all()


def test_no_span_counts_is_zero():
    logits = np.ones((2, 4, 2), np.float32)
    assert span_loss(logits, np.array([4, 9]), np.array([4, 9])) == 0
