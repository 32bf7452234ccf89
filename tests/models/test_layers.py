import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tspo_jax.models import attention
from tspo_jax.models.layers import (
    ACTIVATIONS,
    EncoderLayer,
    LayerNorm,
    Linear,
    Mlp,
    RMSNorm,
    SelfAttention,
    abstract_module,
    merge_params,
    patch_conv,
    scan_layers,
    split_params,
    stack_layers,
)


@pytest.fixture(scope="module")
def x():
    return np.random.default_rng(0).normal(size=(2, 5, 8)).astype(np.float32)


def test_activations(x):
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    expected = {
        "relu": functional.relu,
        "silu": functional.silu,
        "gelu": functional.gelu,
        "gelu_pytorch_tanh": lambda x: functional.gelu(x, approximate="tanh"),
        "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    }
    assert expected.keys() == ACTIVATIONS.keys()
    for name, activation in expected.items():
        np.testing.assert_allclose(
            ACTIVATIONS[name](x), activation(torch.from_numpy(x)).numpy(), atol=1e-6, err_msg=name
        )


def test_layer_norm_keeps_its_digits_far_from_zero(x):
    """The spread of values around 1000 is lost by the one-pass variance in float32."""
    shifted = x + 1000
    exact = shifted.astype(np.float64)
    exact = (exact - exact.mean(-1, keepdims=True)) / np.sqrt(exact.var(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(LayerNorm(8, epsilon=1e-5, rngs=nnx.Rngs(0))(shifted), exact, atol=1e-3)


def test_rms_norm_rounds_before_it_scales(x):
    graphdef, _ = split_params(RMSNorm(8, epsilon=1e-6))
    scale = np.linspace(0.5, 1.5, 8, dtype=np.float32)

    def normalized(x):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)

    np.testing.assert_allclose(merge_params(graphdef, {"scale": scale})(x), normalized(x) * scale, atol=1e-6)
    half, half_scale = jnp.asarray(x, jnp.bfloat16), jnp.asarray(scale, jnp.bfloat16)
    out = merge_params(graphdef, {"scale": half_scale})(half)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out, half_scale * normalized(half.astype(np.float32)).astype(jnp.bfloat16))


class Residual(nnx.Module):
    """A layer with an output of its own and a slice of something per layer."""

    def __init__(self, rngs):
        self.linear = Linear(8, 8, rngs=rngs)

    def __call__(self, x, factor, extra):
        y = factor * self.linear(x) + extra
        return x + y, y.sum()


def test_scan_equals_a_loop_over_the_layers(x):
    layers = stack_layers(Residual, 3, nnx.Rngs(0))
    kernel = layers.linear.kernel[...]
    assert kernel.shape == (3, 8, 8) and jnp.abs(kernel[0] - kernel[1]).max() > 0.01
    extra = jnp.arange(3.0)
    out, sums = jax.jit(lambda x: scan_layers(layers, x, 2.0, per_layer=extra))(x)
    graphdef, params = split_params(layers)
    h, expected = x, []
    for i in range(3):
        h, total = merge_params(graphdef, jax.tree.map(lambda p, i=i: p[i], params))(h, 2.0, extra[i])
        expected.append(total)
    np.testing.assert_allclose(out, h, atol=1e-5)
    np.testing.assert_allclose(sums, expected, atol=1e-4)


def test_layers_without_outputs(x):
    layers = stack_layers(lambda rngs: Linear(8, 8, rngs=rngs), 2, nnx.Rngs(0))
    out, outputs = scan_layers(layers, x)
    assert outputs is None
    np.testing.assert_allclose(out, x @ layers.kernel[0] @ layers.kernel[1], atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_sees_the_past_only_when_causal(x, causal):
    attention = SelfAttention(8, 2, rngs=nnx.Rngs(0))
    changed = x.copy()
    changed[:, 3] += 1
    difference = np.abs(attention(x, causal) - attention(changed, causal)).max((0, 2))
    assert (difference[:3] == 0).all() if causal else (difference[:3] > 1e-6).all()
    assert (difference[3:] > 1e-6).all()


def test_self_attention(x):
    """Against the textbook form in numpy."""
    attention = SelfAttention(8, 2, rngs=nnx.Rngs(1))
    q, k, v = (np.asarray(p(x)).reshape(2, 5, 2, 4) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
    scores = np.exp(np.einsum("bqhd,bkhd->bhqk", q, k) / 2)
    context = np.einsum("bhqk,bkhd->bqhd", scores / scores.sum(-1, keepdims=True), v).reshape(2, 5, 8)
    np.testing.assert_allclose(attention(x, False), attention.out_proj(context), atol=1e-6)


def test_patches_are_rows_first_and_the_border_is_dropped():
    conv = patch_conv(3, 4, use_bias=True, rngs=nnx.Rngs(0))
    image = np.random.default_rng(0).normal(size=(1, 11, 8, 3)).astype(np.float32)
    out = conv(image)
    assert out.shape == (1, 3, 2, 4)
    patch = image[0, 6:9, 3:6].reshape(-1)
    np.testing.assert_allclose(out[0, 2, 1], patch @ conv.kernel[...].reshape(27, 4) + conv.bias[...], atol=1e-5)


def test_half_precision_stays_half(x):
    def layer(rngs):
        return EncoderLayer(8, 16, 2, "gelu", 1e-6, rngs=rngs)

    graphdef, params = split_params(layer(nnx.Rngs(0)))
    half = merge_params(graphdef, jax.tree.map(lambda p: p.astype(jnp.bfloat16), params))
    out = jax.jit(half)(jnp.asarray(x, jnp.bfloat16))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(np.float32), jax.jit(merge_params(graphdef, params))(x), atol=0.1)


def test_abstract_module_has_the_shapes_of_the_real_one():
    def make(rngs):
        return Mlp(4, 6, 8, "gelu", rngs=rngs)

    graphdef, abstract = abstract_module(make)
    _, params = split_params(make(nnx.Rngs(0)))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(abstract))
    assert jax.tree.map(lambda a: (a.shape, a.dtype), abstract) == jax.tree.map(lambda a: (a.shape, a.dtype), params)
    assert merge_params(graphdef, params)(np.ones((2, 4), np.float32)).shape == (2, 8)


@pytest.mark.parametrize("tokens", [300, 350, 384])
def test_attention_in_the_order_of_heads_of_the_tpus_kernel(tokens):
    """384 tokens are whole blocks of it, 350 are padded before they are projected, 300 behind."""
    layer = SelfAttention(32, 2, rngs=nnx.Rngs(0))
    for p in (layer.q_proj, layer.k_proj, layer.v_proj, layer.out_proj):
        p.kernel[...], p.bias[...] = 20 * p.kernel[...], jnp.linspace(-1, 1, 32)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, tokens, 32)), jnp.float32)

    def computed(implementation):
        with attention.computed_by(implementation, interpret=implementation == "pallas"):
            assert (attention.in_whole_blocks(x, 2)[1] is None) == (implementation == "xla" or tokens != 350)
            return jax.jit(nnx.merge(*nnx.split(layer)), static_argnums=1)(x, False)

    np.testing.assert_allclose(computed("pallas"), computed("xla"), atol=1e-4)
