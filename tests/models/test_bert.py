import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tspo_jax.models.bert import BertConfig, BertEmbeddings, BertEncoder, Dropout, visible_bias

SMALL = BertConfig(vocab_size=11, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)


def test_dropout():
    x = jnp.ones((400, 50))
    dropped = Dropout(0.25, jax.random.key(0))(x)
    assert abs(float((dropped == 0).mean()) - 0.25) < 0.02
    np.testing.assert_allclose(dropped[dropped > 0], 1 / 0.75, rtol=1e-6)
    twice = Dropout(0.25, jax.random.key(0))
    assert (twice(x) != twice(x)).any()  # each call draws anew
    assert (Dropout(0.25)(x) == x).all() and (Dropout(0.0, jax.random.key(0))(x) == x).all()


def test_hidden_tokens_are_not_seen():
    """What stands behind the mask changes nothing in front of it; layers draw their own dropout."""
    encoder = BertEncoder(SMALL, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (1, 5, 8))
    bias = visible_bias(jnp.array([1, 1, 1, 0, 0]))[None, None, None]
    run = jax.jit(lambda x, key: encoder(x, bias, dropout=(0.5, key)))
    quiet = jax.jit(lambda x: encoder(x, bias))
    np.testing.assert_allclose(quiet(x)[:, :3], quiet(x.at[:, 3:].set(9.0))[:, :3], atol=1e-5)
    assert np.abs(run(x, jax.random.key(0)) - run(x, jax.random.key(1))).max() > 1e-3


def test_limits():
    embeddings = BertEmbeddings(BertConfig(**(vars(SMALL) | {"max_position_embeddings": 4})), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="5 tokens, more than the model's 4 positions"):
        embeddings(jnp.zeros((1, 5), int))
    with pytest.raises(ValueError, match="no multiple"):
        BertConfig(hidden_size=7, num_attention_heads=2)
