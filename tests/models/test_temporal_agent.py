import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from tspo_jax.checkpoints import folders as checkpoints
from tspo_jax.checkpoints import weights
from tspo_jax.models import temporal_agent
from tspo_jax.models.layers import abstract_module, merge_params, split_params
from tspo_jax.models.temporal_agent import TemporalAgent, positional_encoding, window_attention

PADDING = 9


@pytest.fixture(scope="module", params=range(8))
def case(request, golden, tmp_path_factory):
    """One golden case: its numbers, and the agent read by the real loader from the original's layout."""
    data = np.load(golden / "agent_forward.npz")
    meta = json.loads(str(data["meta"]))[request.param]
    prefix = f"case{meta['case']}/"
    numbers = {name.removeprefix(prefix): data[name] for name in data.files if name.startswith(prefix)}
    tensors = {n.replace("params/", "selector."): a for n, a in numbers.items() if n.startswith("params/")}
    folder = tmp_path_factory.mktemp("agent")
    save_file(tensors, folder / "model.safetensors")
    graphdef, params = checkpoints.load_agent(folder, window=meta["window"], num_heads=meta["heads"])
    return meta, numbers, merge_params(graphdef, params)


def run(agent, features, text, clip_scores, mask, tau):
    """Logits and event features, as one program."""

    @jax.jit
    def both(params):
        agent = merge_params(graphdef, params)
        return agent(features, text, clip_scores, mask, tau), agent.event_features(features, text, clip_scores, mask)

    graphdef, params = split_params(agent)
    return both(params)


def padded_inputs(numbers, rng):
    """Batch of two videos: the golden one followed by padding full of noise, and another that fills the batch."""
    features, text, scores = numbers["image_features"], numbers["text_features"], numbers["clip_scores"]
    T, D = features.shape
    other = rng.normal(size=(T + PADDING, D)).astype(np.float32)
    padding = 100 * rng.normal(size=(PADDING, D)).astype(np.float32)
    batch = np.stack([np.concatenate([features, padding]), other])
    clip_scores = np.stack([np.concatenate([scores, np.full(PADDING, 9.0, np.float32)]), np.zeros(T + PADDING)])
    mask = np.arange(T + PADDING) < np.array([[T], [T + PADDING]])
    return batch, np.concatenate([text, text]), clip_scores, mask


def test_golden(case):
    meta, numbers, agent = case
    features, mask = numbers["image_features"][None], np.ones((1, meta["frames"]), bool)
    logits, events = run(agent, features, numbers["text_features"], numbers["clip_scores"][None], mask, meta["tau"])
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits[0], numbers["scores"], atol=1e-4)
    np.testing.assert_allclose(events[0], numbers["event_features"], atol=1e-4)


@pytest.mark.parametrize("chunk", [4096, 33])
def test_golden_with_right_padding(case, monkeypatch, chunk):
    """Whole, and in chunks that do not divide the number of frames."""
    meta, numbers, agent = case
    monkeypatch.setattr(temporal_agent, "CHUNK", chunk)
    inputs = padded_inputs(numbers, np.random.default_rng(0))
    T = meta["frames"]
    if T + PADDING <= chunk < 4096:
        pytest.skip("one chunk holds all frames")
    logits, events = run(agent, *inputs, meta["tau"])
    np.testing.assert_allclose(logits[0, :T], numbers["scores"], atol=1e-4)
    assert (logits[0, T:] == -jnp.inf).all() and jnp.isfinite(logits[1]).all()
    np.testing.assert_allclose(events[0, :T], numbers["event_features"], atol=1e-4)


def test_golden_checkpoint_folder(golden):
    """The committed TSPO folder, whose weights are bfloat16, scores the two golden questions in one batch."""
    data = np.load(golden / "tspo_agent.npz")
    graphdef, params = checkpoints.load_agent(golden / "tspo_agent")
    stacked = [np.stack([data[f"case{i}/{n}"] for i in range(2)]) for n in ("image_features", "clip_scores", "scores")]
    features, clip_scores, scores = stacked
    text = np.concatenate([data["case0/text_features"], data["case1/text_features"]])
    logits, _ = run(merge_params(graphdef, params), features, text, clip_scores, np.ones(scores.shape, bool), 0.025)
    np.testing.assert_allclose(logits, scores, atol=1e-4)


# ---- the parts ----


def test_positional_encoding():
    encoding = np.asarray(positional_encoding(jnp.arange(4)[None], jnp.array([4]), 768))[0]
    np.testing.assert_array_equal(encoding[0], np.tile([0, 1], 384))
    np.testing.assert_allclose(encoding[1, :4], [0.247404, 0.968912, 0.241659, 0.970361], atol=1e-6)
    np.testing.assert_allclose(encoding[3, 766:], [7.68207e-05, 1.0], atol=1e-9)


def attend(q, k, v, mask, window):
    """`window_attention` of whole sequences [B, n, H, d]."""
    before, after = window // 2, window - 1 - window // 2
    k, v = (jnp.pad(x, ((0, 0), (before, after), (0, 0), (0, 0))) for x in (k, v))
    return window_attention(q, k, v, jnp.pad(mask, ((0, 0), (before, after))), window)


def test_window_row_sums():
    """Equal scores and one-hot values: every row shows which frames it sees, each with weight 1 / their number."""
    zeros, eye = jnp.zeros((1, 20, 1, 20)), jnp.eye(20)[None, :, None]
    weights = np.asarray(attend(zeros, zeros, eye, jnp.ones((1, 20), bool), 12))[0]
    sums = (weights > 0).sum(1)
    np.testing.assert_array_equal(sums, [6, 7, 8, 9, 10, 11] + [12] * 9 + [11, 10, 9, 8, 7])
    np.testing.assert_allclose(weights.max(1), 1 / sums, rtol=1e-6)
    np.testing.assert_array_equal(np.flatnonzero(weights[10]), np.arange(4, 16))  # 6 before, itself, 5 after


@pytest.mark.parametrize("window", [1, 7, 12])
@pytest.mark.parametrize("frames", [5, 31])
def test_window_attention_equals_dense_attention_under_a_band(frames, window):
    rng = np.random.default_rng(window)
    q, k, v = rng.normal(size=(3, 2, frames, 3, 4)).astype(np.float32)
    mask = np.arange(frames) < np.array([[frames], [max(1, frames - 4)]])
    distance = np.arange(frames) - np.arange(frames)[:, None] + window // 2
    seen = (distance >= 0) & (distance < window) & mask[:, None, None, :]
    scores = np.where(seen, np.einsum("bqhd,bkhd->bhqk", q, k) / 2, -np.inf)
    scores = np.exp(scores - scores.max(-1, keepdims=True, where=seen, initial=-1e3))
    weights = scores / np.maximum(scores.sum(-1, keepdims=True), 1e-30)
    expected = np.einsum("bhqk,bkhd->bqhd", weights, v).reshape(2, frames, 12)
    out = np.asarray(jax.jit(attend, static_argnums=4)(q, k, v, mask, window))
    np.testing.assert_allclose(out[mask], expected[mask], atol=1e-5)


def test_memory_is_linear_in_frames():
    """Doubling the frames doubles the attention's scratch memory; a T x T matrix would quadruple it."""

    def scratch(frames):
        x = jax.ShapeDtypeStruct((1, frames, 2, 4), jnp.float32)
        compiled = jax.jit(attend, static_argnums=4).lower(x, x, x, jax.ShapeDtypeStruct((1, frames), bool), 8)
        return compiled.compile().memory_analysis().temp_size_in_bytes

    small, large = scratch(4096), scratch(8192)
    assert large < 2.2 * small and large < 8192**2


def test_100_000_frames_fit_into_3_gb():
    """The compiled program's own account at width 768: inputs, scratch and output."""
    graphdef, params = abstract_module(lambda rngs: TemporalAgent(768, rngs=rngs))

    def memory(frames):
        shapes = [(1, frames, 768), (1, 768), (1, frames), (1, frames)]
        dtypes = [jnp.float32] * 3 + [bool]
        inputs = [jax.ShapeDtypeStruct(*x) for x in zip(shapes, dtypes, strict=True)]
        run = jax.jit(lambda params, *inputs: merge_params(graphdef, params)(*inputs))
        usage = run.lower(params, *inputs).compile().memory_analysis()
        return usage.temp_size_in_bytes + usage.argument_size_in_bytes + usage.output_size_in_bytes

    assert memory(100_000) < min(2e9, 2.1 * memory(50_000))


def test_published_size():
    _, params = abstract_module(lambda rngs: TemporalAgent(768, rngs=rngs))
    leaves = jax.tree.leaves(params)
    assert len(leaves) == 12 and sum(leaf.size for leaf in leaves) == 3_543_552


def test_bad_sizes():
    with pytest.raises(ValueError, match="8 heads do not divide its width 36"):
        TemporalAgent(36, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="window is 0"):
        TemporalAgent(32, window=0, rngs=nnx.Rngs(0))


# ---- gradients ----


def gradient(features, mask):
    """Of a fixed function of the first video's first 20 logits, at a fresh agent."""
    graphdef, params = split_params(TemporalAgent(32, window=6, rngs=nnx.Rngs(0)))
    text, weight = jnp.split(jax.random.normal(jax.random.key(1), (52,)), [32])

    def objective(params):
        B, T, _ = features.shape
        agent = merge_params(graphdef, params)
        logits = agent(features, jnp.broadcast_to(text, (B, 32)), jnp.zeros((B, T)), mask)
        return jnp.sum(jax.nn.log_softmax(logits[0])[:20] * weight)

    return weights.flatten(jax.jit(jax.grad(objective))(params))


@pytest.fixture(scope="module")
def one_video():
    features = jax.random.normal(jax.random.key(3), (1, 20, 32))
    return features, gradient(features, jnp.ones((1, 20), bool))


def test_every_parameter_that_has_an_effect_has_a_gradient(one_video):
    for path, g in one_video[1].items():
        without_effect = "ffn_o" in path or path == "temporal.Self_k.bias"
        assert jnp.abs(g).max() == 0 if without_effect else jnp.abs(g).max() > 1e-6, path


@pytest.mark.parametrize("chunk", [4096, 8])
def test_gradient_ignores_padding(one_video, monkeypatch, chunk):
    """Neither padded frames (zeros, as a loader writes them) nor a video without any frame reach the gradient."""
    monkeypatch.setattr(temporal_agent, "CHUNK", chunk)
    features, expected = one_video
    batch = jnp.zeros((2, 31, 32)).at[0, :20].set(features[0])
    for path, g in gradient(batch, jnp.arange(31) < jnp.array([[20], [0]])).items():
        np.testing.assert_allclose(g, expected[path], atol=1e-5, err_msg=path)
