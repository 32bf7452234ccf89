from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tspo_jax.checkpoints.weights import Format, flatten, load_params, read_config, unflatten
from tspo_jax.devices import sharding
from tspo_jax.models import attention
from tspo_jax.models.layers import abstract_module, merge_params, split_params
from tspo_jax.models.qwen2 import Qwen2, Qwen2Config, rope_angles, rotate

ALONE = Format(rename=((r"^lm_head\.", "lm_head."), (r"^", "model.")))
SIZES = dict(
    vocab_size=61,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    rms_norm_eps=1e-6,
)
LENGTHS = np.array([9, 4, 7])
STEPS = 4
IDS = np.random.default_rng(0).integers(0, 61, (3, LENGTHS.max() + STEPS))


@jax.jit
def full(lm, ids):
    """Logits [B, N, V] of whole sequences."""
    hidden, _ = lm(lm.embed_tokens(ids), jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape))
    return lm.logits(hidden)


@jax.jit
def prefill(lm, ids):
    hidden, cache = lm(lm.embed_tokens(ids), jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape))
    return lm.logits(hidden), cache.extend(STEPS)


@jax.jit
def decode(lm, ids, positions, cache):
    hidden, cache = lm(lm.embed_tokens(ids), positions, cache)
    return lm.logits(hidden), cache


@pytest.fixture(scope="module")
def model():
    """Large weights, so that every position and head matters to the logits."""
    rng = np.random.default_rng(1)
    graphdef, abstract = abstract_module(lambda rngs: Qwen2(Qwen2Config(**SIZES, rope_theta=1e6), rngs=rngs))
    params = jax.tree.map(lambda p: 0.3 * rng.normal(size=p.shape).astype(np.float32), abstract)
    return merge_params(graphdef, params)


@pytest.mark.parametrize(("tied", "kv_heads", "theta"), [(False, 2, 1e6), (True, 2, 1e4), (False, 6, 1e6)])
def test_hugging_face(tmp_path, tied, kv_heads, theta):
    torch = pytest.importorskip("torch")
    from transformers import Qwen2Config as HFConfig
    from transformers import Qwen2ForCausalLM

    sizes = SIZES | dict(num_key_value_heads=kv_heads, tie_word_embeddings=tied)
    config = HFConfig(**sizes, rope_parameters={"rope_type": "default", "rope_theta": theta})
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    oracle = Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        for p in oracle.parameters():
            p.copy_(0.3 * torch.randn_like(p))
        oracle.save_pretrained(tmp_path)
        expected = oracle(input_ids=torch.from_numpy(IDS)).logits

    config = Qwen2Config.from_hf(read_config(tmp_path))
    assert config.rope_theta == theta
    graphdef, abstract = abstract_module(lambda rngs: Qwen2(config, rngs=rngs))
    assert ("lm_head" in abstract) != tied
    loaded = merge_params(graphdef, load_params(tmp_path, abstract, ALONE))
    np.testing.assert_allclose(full(loaded, IDS), expected, atol=1e-4)
    logits, cache = prefill(loaded, IDS[:, :6])
    for n in range(6, 6 + STEPS):
        np.testing.assert_allclose(logits[:, -1], expected[:, n - 1], atol=1e-4)
        logits, cache = decode(loaded, IDS[:, n : n + 1], np.full((3, 1), n), cache)


def test_right_padded_prompts_decode_as_if_alone(model):
    """Prompts of 9, 4 and 7 tokens, padded with garbage, then four tokens each at their own positions."""
    N = LENGTHS.max()
    expected = np.asarray(full(model, IDS))
    padded = np.where(np.arange(N) < LENGTHS[:, None], IDS[:, :N], 60)
    logits, cache = prefill(model, padded)
    rows = np.arange(3)
    np.testing.assert_allclose(logits[rows, LENGTHS - 1], expected[rows, LENGTHS - 1], atol=1e-4)
    for step in range(STEPS):
        position = LENGTHS + step
        logits, cache = decode(model, IDS[rows, position][:, None], position[:, None], cache)
        np.testing.assert_allclose(logits[:, 0], expected[rows, position], atol=1e-4)


def test_several_tokens_at_once_extend_a_cache(model):
    """A chunk of tokens through the cache is causal inside the chunk."""
    _, cache = prefill(model, IDS[:, :9])
    logits, _ = decode(model, IDS[:, 9:12], np.broadcast_to(np.arange(9, 12), (3, 3)), cache)
    np.testing.assert_allclose(logits, full(model, IDS)[:, 9:12], atol=1e-4)


def test_prefill_is_a_call_of_which_one_token_is_used(model):
    positions = jnp.broadcast_to(jnp.arange(9), (3, 9))
    embeddings, rows = model.embed_tokens(IDS[:, :9]), np.arange(3)
    expected, whole = model(embeddings, positions)
    hidden, cache = model.prefill(embeddings, positions, LENGTHS - 1)
    np.testing.assert_allclose(hidden, expected[rows, LENGTHS - 1], atol=1e-5)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), cache, whole)


def test_what_is_added_behind_layers_is_added_by_a_call_as_by_prefill(model):
    """Behind the first two of three layers (deepstack)."""
    added = jnp.asarray(np.random.default_rng(4).normal(size=(3, 2, 9, 24)), jnp.float32)
    embeddings = model.embed_tokens(IDS[:, :9])
    slots, last = jnp.broadcast_to(jnp.arange(9), (3, 9)), jnp.array([8, 3, 6])

    @jax.jit
    def states(lm, added):
        whole, cache = lm(embeddings, slots, added=added)
        return whole[jnp.arange(3), last], cache, *lm.prefill(embeddings, slots, last, added=added)

    hidden, cache, expected, expected_cache = states(model, added)
    np.testing.assert_allclose(hidden, expected, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), cache, expected_cache)
    assert np.abs(hidden - states(model, 0 * added)[0]).max() > 0.1


@pytest.mark.parametrize("model_axis", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("is_qwen3", [False, True])
def test_queries_keys_and_values_of_one_product(is_qwen3, model_axis):
    """As TPUs compute them (their kernel interpreted), over a mesh that splits the heads of keys or cannot."""
    kinds = dict(attention_bias=False, use_qk_norm=True, head_dim=8) if is_qwen3 else {}
    sizes = SIZES | dict(num_attention_heads=8, hidden_size=32, vocab_size=64)
    graphdef, params = split_params(Qwen2(Qwen2Config(**sizes, **kinds), rngs=nnx.Rngs(2)))
    params = jax.tree.map(lambda p: 4 * p, params)
    mesh = sharding.make_mesh((("data", -1), ("model", model_axis)), jax.devices()[:4])
    config = {"num_attention_heads": 8, "num_key_value_heads": 2}
    where = sharding.answerer_sharding(mesh, config)
    split = unflatten(
        {path: jax.device_put(x, where(f"language_model.{path}", x.shape)) for path, x in flatten(params).items()}
    )
    ids = np.random.default_rng(3).integers(0, 61, (4, 9))

    def prefilled(params, implementation):
        def run(params):
            with attention.computed_by(implementation, mesh, interpret=implementation == "pallas"):
                lm = merge_params(graphdef, params)
                slots = jnp.broadcast_to(jnp.arange(9), ids.shape)
                return lm.prefill(lm.embed_tokens(ids), slots, jnp.array([8, 3, 6, 1]))

        return jax.jit(run)(params)

    hidden, cache = prefilled(split, "pallas")
    expected, expected_cache = prefilled(params, "xla")
    np.testing.assert_allclose(hidden, expected, atol=1e-4)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-4), cache, expected_cache)


def test_half_precision_keeps_float32_logits(model):
    graphdef, params = split_params(model)
    half = merge_params(graphdef, jax.tree.map(lambda p: p.astype(jnp.bfloat16), params))
    logits, cache = prefill(half, IDS[:, :9])
    assert logits.dtype == jnp.float32 and cache.k[0].dtype == jnp.bfloat16
    expected = full(model, IDS[:, :9])
    assert np.abs(logits - expected).max() < 0.1 * np.abs(expected).max()


def test_rotation_depends_on_distance_alone():
    q, k = np.random.default_rng(0).normal(size=(2, 1, 1, 1, 8)).astype(np.float32)

    def product(i, j):
        angles = rope_angles(jnp.array([[i], [j]]), 8, 1e4)
        return float(jnp.sum(rotate(q, angles[:1]) * rotate(k, angles[1:])))

    assert product(7, 3) == pytest.approx(product(104, 100), abs=1e-4)
    assert abs(product(7, 3) - product(7, 4)) > 1e-3


def test_configuration_of_both_generations_of_transformers():
    old = Qwen2Config.from_hf(SIZES | {"rope_theta": 1e6, "rope_scaling": None, "use_sliding_window": False})
    new = Qwen2Config.from_hf(SIZES | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}})
    assert old == new and old.rope_theta == 1e6


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_sliding_window", True),
        ("rope_scaling", {"type": "yarn", "factor": 4.0}),
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e6}),
    ],
)
def test_configuration_that_is_not_supported(field, value):
    with pytest.raises(ValueError, match=f"config.json: {field}"):
        Qwen2Config.from_hf(SIZES | {field: value})


def test_configuration_without_a_field():
    with pytest.raises(ValueError, match="config.json: .*hidden_size"):
        Qwen2Config.from_hf({k: v for k, v in SIZES.items() if k != "hidden_size"})
