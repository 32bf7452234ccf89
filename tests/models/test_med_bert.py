"""MED-BERT with dropped parts; Hugging Face's classes are compared in tests/checkpoints/test_testa_folders.py."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tspo_jax.models.bert import BertConfig
from tspo_jax.models.med_bert import MedBert

CONFIG = BertConfig(
    vocab_size=11,
    hidden_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=16,
    type_vocab_size=0,
    cross_width=6,
)


def test_modes():
    """Causal states do not see what follows; what is read counts in multimodal mode, but for what its mask hides."""
    model = MedBert(CONFIG, rngs=nnx.Rngs(0))
    ids, mask = jnp.array([[1, 2, 3, 4]]), jnp.ones((1, 4), int)
    read = jax.random.normal(jax.random.key(0), (1, 3, 6))
    causal = jax.jit(lambda ids: model(ids, mask, causal=True))
    np.testing.assert_allclose(causal(ids)[:, :2], causal(ids.at[0, 2:].set(7))[:, :2], atol=1e-6)
    multimodal = jax.jit(lambda read: model(ids, mask, read, jnp.array([[1, 1, 0]])))
    assert np.abs(multimodal(read) - jax.jit(lambda: model(ids, mask))()).max() > 1e-4
    np.testing.assert_allclose(multimodal(read), multimodal(read.at[:, 2].set(5.0)), atol=1e-6)
