"""Adapters of projections: what they compute, where they go, merging."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tspo_jax.models.layers import Linear
from tspo_jax.models.lora import TARGETS, AdaptedLinear, LoraConfig, is_adapter, merged, target_path


def adapted(use_bias=True):
    linear = Linear(4, 3, use_bias=use_bias, rngs=nnx.Rngs(0))
    module = AdaptedLinear(linear, LoraConfig(2, 6.0), rngs=nnx.Rngs(1))
    module.lora_B.kernel[...] = jax.random.normal(jax.random.key(2), (2, 3))
    return linear, module


@pytest.mark.parametrize("use_bias", [True, False])
def test_product_by_hand(use_bias):
    linear, module = adapted(use_bias=use_bias)
    x = jax.random.normal(jax.random.key(3), (5, 4))
    expected = linear(x) + 3.0 * (x @ module.lora_A.kernel[...]) @ module.lora_B.kernel[...]
    np.testing.assert_allclose(module(x), expected, rtol=1e-6)


def test_nothing_is_changed_at_first():
    linear = Linear(4, 3, rngs=nnx.Rngs(0))
    module = AdaptedLinear(linear, LoraConfig(2), rngs=nnx.Rngs(1))
    x = jnp.ones((2, 4))
    np.testing.assert_array_equal(module(x), linear(x))
    assert 0 < np.abs(module.lora_A.kernel[...]).max() <= 0.5  # 1 / sqrt(4)


def test_products_are_in_the_dtype_of_the_activations():
    _, module = adapted()
    module.kernel, module.bias = (nnx.Param(x[...].astype(jnp.bfloat16)) for x in (module.kernel, module.bias))
    assert module(jnp.ones((2, 4), jnp.bfloat16)).dtype == jnp.bfloat16
    assert module.lora_A.kernel[...].dtype == jnp.float32


def test_merged_weights_give_the_same():
    _, module = adapted()
    stacked = [x[None] for x in (module.kernel[...], module.lora_A.kernel[...], module.lora_B.kernel[...])]
    kernel = merged(*stacked, module.scaling)[0]
    x = jax.random.normal(jax.random.key(3), (5, 4))
    np.testing.assert_allclose(x @ kernel + module.bias[...], module(x), atol=1e-5)


def test_scaling():
    assert LoraConfig(16, 32.0).scaling == 2 and LoraConfig(16, 32.0, use_rslora=True).scaling == 8


def test_paths():
    assert target_path("q_proj") == "language_model.layers.self_attn.q_proj"
    assert target_path("down_proj") == "language_model.layers.mlp.down_proj"
    assert is_adapter("language_model.layers.mlp.up_proj.lora_A.kernel")
    assert not is_adapter("language_model.layers.mlp.up_proj.kernel")


@pytest.mark.parametrize(
    "change, said", [({"r": 0}, "r is 0"), ({"targets": ()}, "empty"), ({"targets": ("x",)}, "names x")]
)
def test_settings_without_meaning(change, said):
    with pytest.raises(ValueError, match=said):
        LoraConfig(**({"targets": tuple(TARGETS)} | change))
