"""Every way of computing attention against the textbook form; its memory; over a mesh; what cannot be."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tspo_jax.devices import sharding
from tspo_jax.models import attention

# Tokens and head width of CLIP L/14, CLIP L/14-336, SigLIP so400m, Qwen2.5-VL's tower and Qwen2 (4 queries to a key).
SHAPES = [(257, 64, 2), (577, 64, 1), (729, 72, 1), (300, 80, 2), (640, 128, 4)]


def textbook(q, k, v, seen):
    """In float64: q [B,N,H,d], k and v [B,S,heads,d], seen bool, broadcast to [B,H,N,S]."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    scores = np.where(seen, np.einsum("bqhd,bkhd->bhqk", q, k, optimize=True) / np.sqrt(q.shape[-1]), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True), v, optimize=True)


def values(tokens, width, heads, kv_heads, rows=2):
    rng = np.random.default_rng(tokens)
    return [rng.normal(size=(rows, tokens, h, width)).astype(np.float32) for h in (heads, kv_heads, kv_heads)]


def computed(implementation, function, *args, mesh=None):
    """`function(*args)` compiled anew, the TPU's kernel interpreted."""

    def call(*args):
        with attention.computed_by(implementation, mesh, interpret=implementation == "pallas"):
            return function(*args)

    return jax.jit(call)(*args)


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
@pytest.mark.parametrize("tokens, width, group", SHAPES)
def test_all_shapes_of_the_models(implementation, tokens, width, group):
    q, k, v = values(tokens, width, group, 1, rows=1)
    out = computed(
        implementation, lambda q, k, v: (attention.causal(q, k, v), attention.bidirectional(q, k, v)), q, k, v
    )
    before = np.tril(np.ones((tokens, tokens), bool))
    np.testing.assert_allclose(out[0], textbook(q, k, v, before), atol=1e-5)
    np.testing.assert_allclose(out[1], textbook(q, k, v, True), atol=1e-5)


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
def test_keys_that_do_not_count(implementation):
    q, k, v = values(150, 16, 4, 2)
    is_key = np.arange(150) < np.array([[150], [37]])
    out = computed(implementation, attention.bidirectional, q, k, v, is_key)
    np.testing.assert_allclose(out, textbook(q, k, v, is_key[:, None, None]), atol=1e-5)


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
def test_windows_are_apart(implementation):
    """Windows within a block of the kernel, over the border of two, and larger than one."""
    lengths = np.array([60, 60, 30, 60, 60, 7, 280, 13])
    q, k, v = values(lengths.sum(), lengths.sum(), 2, 2)
    out = computed(implementation, partial(attention.windowed, lengths=lengths), q, k, v)
    for end, length in zip(np.cumsum(lengths), lengths, strict=True):
        of_window = slice(end - length, end)
        expected = textbook(*(x[:, of_window] for x in (q, k, v)), np.ones(length, bool))
        np.testing.assert_allclose(out[:, of_window], expected, atol=1e-5)


def test_new_tokens_see_the_cache_up_to_their_slot():
    q, k, v = values(9, 8, 6, 2)
    slots = np.array([[3, 4], [7, 8]])
    out = attention.cached(q[:, :2], k.swapaxes(1, 2), v.swapaxes(1, 2), slots)
    expected = textbook(q[:, :2], k, v, np.arange(9) <= slots[:, None, :, None])
    np.testing.assert_allclose(out, expected, atol=1e-5)
    new = [np.take_along_axis(x, slots[:, :, None, None], axis=1).swapaxes(1, 2) for x in (k, v)]
    k, v = (np.where(np.isin(np.arange(9), [3, 4, 7, 8])[:, None, None], 7, x).swapaxes(1, 2) for x in (k, v))
    k[1, :, 3:5], v[1, :, 3:5] = (x.swapaxes(1, 2)[1, :, 3:5] for x in values(9, 8, 6, 2)[1:])  # filled in its row
    np.testing.assert_allclose(attention.cached(q[:, :2], k, v, slots, new), expected, atol=1e-5)


def test_one_token_against_the_cache_in_the_form_that_cudnn_takes():
    """What is turned and counted around the kernel, with XLA's in its place."""
    q, k, v = values(11, 11, 6, 2)
    slots = np.array([[10], [4]])

    def cached(q, k, v):
        return attention.cached(q[:, :1], k.swapaxes(1, 2), v.swapaxes(1, 2), slots)

    def as_cudnn(q, k, v):
        return attention._cudnn_cached(q[:, :1], k, v, slots, "xla")

    np.testing.assert_allclose(as_cudnn(q, k, v), cached(q, k, v), atol=1e-5)
    for found, exact in zip(gradients(as_cudnn)(q, k, v), gradients(cached)(q, k, v), strict=True):
        np.testing.assert_allclose(found, exact, atol=1e-5)


ODD = [("causal", 11, None), ("bidirectional", 11, None), ("bidirectional", 11, 4), ("bidirectional", 12, 4)]


@pytest.mark.parametrize("kind, tokens, num_keys", ODD)
def test_gradients_in_the_form_that_cudnn_takes(kind, tokens, num_keys):
    """It takes even numbers of tokens only; XLA's in its place."""
    is_key = () if num_keys is None else (np.arange(tokens) < [[num_keys], [tokens]],)
    args = values(tokens, 8, 4, 2)

    def as_cudnn(q, k, v):
        return attention._cudnn(q, k, v, *is_key, causal=kind == "causal", implementation="xla")

    def plain(q, k, v):
        return getattr(attention, kind)(q, k, v, *is_key)

    np.testing.assert_allclose(as_cudnn(*args), plain(*args), atol=1e-5)
    for found, exact in zip(gradients(as_cudnn)(*args), gradients(plain)(*args), strict=True):
        np.testing.assert_allclose(found, exact, atol=1e-5)


@pytest.mark.parametrize("kind, tokens, num_keys", ODD)
def test_jax_admits_what_cudnn_is_given(kind, tokens, num_keys, monkeypatch):
    """As far as it can be asked without a GPU: while tracing."""
    kernels = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(kernels, "check_cudnn_version", lambda: 91900)
    q, k, v = (x.astype(jnp.bfloat16) for x in values(tokens, 64, 4, 2))
    is_key = () if num_keys is None else (np.arange(tokens) < [[num_keys], [tokens]],)

    def loss(q, k, v):
        out = attention._cudnn(q, k, v, *is_key, causal=kind == "causal")
        slots = np.array([[tokens - 1], [3]])
        return jnp.sum(out.astype(jnp.float32)) + jnp.sum(attention._cudnn_cached(q[:, :1], k, v, slots))

    with pytest.raises(NotImplementedError, match="length Q 1"):  # the check is there
        one = partial(jax.nn.dot_product_attention, implementation="cudnn")
        jax.make_jaxpr(jax.grad(lambda q: jnp.sum(one(q[:, :1], k, v)).astype(jnp.float32)))(q)
    traced = str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v))
    assert "dot_product_attention_bwd" in traced


def gradients(function, mesh=None, implementation="xla"):
    """Of a loss of q, k and v in which every output counts differently."""

    def loss(q, k, v):
        with attention.computed_by(implementation, mesh, interpret=implementation == "pallas"):
            return jnp.sum(jnp.sin(function(q, k, v)))

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("implementation, tokens", [("xla", 1100), ("pallas", 300)])
def test_gradients(implementation, tokens, is_causal):
    args = values(tokens, 8, 4, 2, rows=1)
    function = attention.causal if is_causal else attention.bidirectional
    expected = jax.jit(
        jax.grad(
            lambda *qkv: jnp.sum(jnp.sin(jax.nn.dot_product_attention(*qkv, is_causal=is_causal))), argnums=(0, 1, 2)
        )
    )(*args)
    for found, exact in zip(gradients(function, None, implementation)(*args), expected, strict=True):
        np.testing.assert_allclose(found, exact, atol=3e-5)


@pytest.mark.parametrize("function", [attention.causal, attention.bidirectional])
def test_gradients_take_memory_linear_in_the_tokens(function):
    def temporaries(tokens):
        x = jax.ShapeDtypeStruct((1, tokens, 4, 64), jnp.float32)
        return gradients(function).lower(x, x, x).compile().memory_analysis().temp_size_in_bytes

    half, whole = temporaries(2048), temporaries(4096)
    assert whole < 2.2 * half
    assert whole < 131e6  # of 4 x 4,096 x 4,096 scores, 268 MB, nothing is kept


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
@pytest.mark.parametrize("data, model, kv_heads", [(2, 4, 4), (4, 2, 2), (2, 4, 2)])
def test_sharded_equals_unsharded(implementation, data, model, kv_heads):
    """With key and value heads that the mesh divides, and with fewer, which every device then has."""
    mesh = sharding.make_mesh((("data", data), ("model", model)), jax.devices())
    args = values(140, 16, 4, kv_heads, rows=8)

    def both(q, k, v):
        return attention.causal(q, k, v), attention.bidirectional(q, k, v)

    alone = computed("xla", both, *args)
    spread = computed(implementation, both, *sharding.put_batch(mesh, args), mesh=mesh)
    for one, other in zip(alone, spread, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_rows_that_the_mesh_does_not_divide():
    mesh = sharding.make_mesh((("data", 2), ("model", 4)), jax.devices())
    q, k, v = values(140, 16, 3, 3, rows=3)
    for function in (attention.causal, attention.bidirectional):
        spread = computed("pallas", function, q, k, v, mesh=mesh)
        np.testing.assert_allclose(spread, computed("xla", function, q, k, v), atol=1e-5)


def test_automatic_choice(monkeypatch):
    def choice(platform, dtype=jnp.bfloat16, tokens=1024, width=128):
        monkeypatch.setattr(attention, "platform_of", lambda mesh: platform)
        monkeypatch.setattr(attention, "_has_cudnn", lambda computer: True)
        return attention.chosen(width, dtype, tokens)

    assert choice("cpu") == "xla"
    assert choice("tpu") == "pallas" and choice("gpu") == "cudnn"
    # What a kernel cannot do, or gains nothing by.
    assert choice("tpu", jnp.float32) == choice("gpu", jnp.float32) == "xla"
    assert choice("tpu", tokens=77) == choice("gpu", tokens=77) == "xla"
    assert choice("gpu", width=100) == choice("gpu", width=256) == "xla"


def test_what_cannot_be_says_why(monkeypatch):
    with pytest.raises(ValueError, match="'cudnn', a kernel for GPUs, but the devices are CPUs"):
        computed("cudnn", attention.causal, *values(8, 8, 2, 2))
    with pytest.raises(ValueError, match="'pallas', a kernel for TPUs, but the devices are GPUs"):
        attention.check("pallas", "gpu")
    with pytest.raises(ValueError, match="'flash', not one of auto, xla, cudnn, pallas"):
        computed("flash", attention.causal, *values(8, 8, 2, 2))
    with pytest.raises(ValueError, match="bfloat16 or float16, but the values are float32"):
        attention.check("cudnn", "gpu", jnp.float32)
    monkeypatch.setattr(attention, "platform_of", lambda mesh: "gpu")
    with attention.computed_by("cudnn"), pytest.raises(ValueError, match="multiples of 8 up to 128 wide, not 100"):
        attention.chosen(100, jnp.bfloat16, 512)


def test_a_gate_of_0_and_1_is_a_mask():
    """Weights that are closed and made to sum to 1 again are those of a softmax without them; an open gate is none."""
    q, k, v = (jax.random.normal(key, (1, 5, 2, 8)) for key in jax.random.split(jax.random.key(0), 3))
    seen = jax.random.bernoulli(jax.random.key(1), 0.5, (5, 5)) | jnp.eye(5, dtype=bool)
    bias = jax.random.normal(jax.random.key(2), (2, 5, 5))
    gated = jax.jit(lambda gate: attention.biased(q, k, v, bias, gate))
    masked = jax.nn.dot_product_attention(q, k, v, bias=bias[None], mask=seen[None, None])
    np.testing.assert_allclose(gated(seen.astype(jnp.float32)), masked, atol=1e-5)
    np.testing.assert_allclose(gated(jnp.ones((5, 5))), attention.biased(q, k, v, bias[None]), atol=1e-5)


def test_a_closed_gates_gradient_is_bounded():
    """However high the score behind it: by how far its value is from what is read."""
    q, v = jnp.ones((1, 1, 1, 1)), jnp.array([1.0, 2.0, 5.0]).reshape(1, 3, 1, 1)

    def read(gate, score):
        k = jnp.array([0.0, 0.0, score]).reshape(1, 3, 1, 1)
        return attention.biased(q, k, v, None, gate).sum()

    for score in (0.0, 60.0, 1000.0):
        value, gradient = jax.value_and_grad(read)(jnp.array([1.0, 1.0, 0.0]), score)
        np.testing.assert_allclose(value, 1.5, rtol=1e-6)
        np.testing.assert_allclose(gradient, [-0.25, 0.25, 1.75], rtol=1e-5)
    low = jax.grad(read)(jnp.array([1.0, 1.0, 0.0]), -2.0)
    np.testing.assert_allclose(low[2], 1.75 * np.exp(-2.0), rtol=1e-5)  # lower scores count as they are
