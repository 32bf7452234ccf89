"""The question-aware agent: the paper's at first, gradients in its own terms, and what it can learn."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tspo_jax.checkpoints import weights
from tspo_jax.checkpoints.folders import agent_graphdef, load_agent
from tspo_jax.checkpoints.plain_folders import CheckpointError
from tspo_jax.export import export
from tspo_jax.models import question_aware_agent, temporal_agent
from tspo_jax.models.clip import cosine_similarity
from tspo_jax.models.layers import abstract_module, merge_params, split_params
from tspo_jax.models.question_aware_agent import QuestionAwareAgent
from tspo_jax.models.temporal_agent import TemporalAgent
from tspo_jax.tspo import policy

NEW_TERMS = {"modulation.kernel": (64, 128), "modulation.bias": (128,), "offset_bias": (8, 12), "clip_weight": (8,)}
NEW_TERMS |= {"match_weight.kernel": (64, 7), "match_weight.bias": (7,)}


def inputs(T=31, B=2, D=64, seed=0):
    rng = np.random.default_rng(seed)
    features, text = rng.normal(size=(B, T, D)), rng.normal(size=(B, D))
    features, text = features.astype(np.float32), text.astype(np.float32)
    return features, text, cosine_similarity(text, features), np.arange(T) < np.array([[T], [T - 7]])


def logits(agent, *inputs):
    graphdef, params = agent
    return jax.jit(lambda params: merge_params(graphdef, params)(*inputs))(params)


@pytest.fixture(scope="module")
def trained(golden):
    """A question-aware agent none of whose terms is zero."""
    graphdef, params = load_agent(golden / "tspo_agent", kind="question_aware")
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda x: np.asarray(x) + 0.05 * rng.normal(size=x.shape).astype(np.float32), params)
    return graphdef, params


@pytest.mark.parametrize("seed", [None, 3])
def test_at_first_it_is_the_papers(golden, plain_clip, seed):
    """Loaded from a folder of the paper's agent, and fresh."""
    folder, options = (golden / "tspo_agent", {}) if seed is None else (plain_clip, {"seed": seed})
    paper = load_agent(folder, **options)
    question_aware = load_agent(folder, kind="question_aware", **options)
    shared = {name: question_aware[1][name] for name in paper[1]}
    jax.tree.map(np.testing.assert_array_equal, shared, paper[1])
    own = weights.flatten({name: x for name, x in question_aware[1].items() if name not in paper[1]})
    assert {path: x.shape for path, x in own.items()} == NEW_TERMS and not any(x.any() for x in own.values())
    np.testing.assert_array_equal(logits(question_aware, *inputs()), logits(paper, *inputs()))


def test_every_new_term_has_a_gradient_at_first(golden):
    graphdef, params = load_agent(golden / "tspo_agent", kind="question_aware")
    features, text, clip_scores, mask = inputs()

    def objective(params):
        scores = merge_params(graphdef, params)(features, text, clip_scores, mask, 1.0)
        return jnp.sum(jnp.where(mask, scores, 0) * np.cos(np.arange(31)))

    grads = weights.flatten(jax.jit(jax.grad(objective))(params))
    for path in NEW_TERMS:
        assert jnp.isfinite(grads[path]).all() and jnp.abs(grads[path]).max() > 1e-6, path


def test_the_question_changes_what_attention_sees(trained):
    features, text, clip_scores, mask = inputs()
    graphdef, params = trained
    agent = merge_params(graphdef, params)
    events = agent.event_features(features, text, clip_scores, mask)
    assert np.abs(agent.event_features(features, text[::-1], clip_scores, mask) - events).max() > 0.01
    assert np.abs(agent.event_features(features, text, clip_scores[::-1], mask) - events).max() > 0.01


def test_biases_by_hand():
    """Equal keys and one-hot values: the output is the weights, softmax(offset bias + key bias) over the window."""
    T, window = 9, 4
    zeros, eye = jnp.zeros((1, T, 1, T)), jnp.eye(T)[None, :, None]
    offset_bias, key_bias = jnp.array([[0.5, -1.0, 2.0, 0.0]]), jnp.arange(T, dtype=jnp.float32)[None, :, None] / 3
    pad = ((0, 0), (2, 1))
    k, v = (jnp.pad(x, (*pad, (0, 0), (0, 0))) for x in (zeros, eye))
    out = temporal_agent.window_attention(
        zeros, k, v, jnp.pad(jnp.ones((1, T), bool), pad), window, offset_bias, jnp.pad(key_bias, (*pad, (0, 0)))
    )[0]
    for frame in range(T):
        seen = [(key, key - frame + 2) for key in range(frame - 2, frame + 2) if 0 <= key < T]
        weight = np.exp([offset_bias[0, place] + key / 3 for key, place in seen])
        np.testing.assert_allclose(out[frame, [key for key, _ in seen]], weight / weight.sum(), rtol=1e-5)


def test_best_matches_by_hand():
    """Window 5: a frame and up to 2 before and after it; what lies behind the mask is not seen."""
    assert question_aware_agent.spans(5) == [(0, 0), (1, 0), (1, 0), (2, 0), (0, 1), (0, 1), (0, 2)]
    scores, mask = jnp.array([[0.1, 0.4, 0.2, -0.3, 0.0, 9.0]]), jnp.arange(6)[None] < 5
    best = question_aware_agent.best_matches(scores, mask, 5)[0].T
    np.testing.assert_array_equal(best[0, :5], scores[0, :5])
    np.testing.assert_allclose(best[3, :5], [0.1, 0.4, 0.4, 0.4, 0.2])
    np.testing.assert_allclose(best[4, :5], [0.4, 0.4, 0.2, 0.0, 0.0])
    assert (best[:, 5] == 0).all()


@pytest.mark.parametrize("chunk", [4096, 8])
def test_padding_changes_nothing(trained, monkeypatch, chunk):
    monkeypatch.setattr(temporal_agent, "CHUNK", chunk)
    features, text, clip_scores, _ = inputs()
    whole = logits(trained, features, text, clip_scores, np.ones((2, 31), bool))
    noise = 100 * np.random.default_rng(2).normal(size=(2, 9, 64)).astype(np.float32)
    padded = np.concatenate([features, noise], 1), text, np.pad(clip_scores, ((0, 0), (0, 9)), constant_values=9.0)
    with_padding = logits(trained, *padded, np.tile(np.arange(40) < 31, (2, 1)))
    np.testing.assert_allclose(with_padding[:, :31], whole, atol=1e-4)
    assert (with_padding[:, 31:] == -jnp.inf).all()


def test_cost_is_linear_in_frames():
    """Doubling the frames doubles arithmetic and memory."""
    graphdef, params = abstract_module(lambda rngs: QuestionAwareAgent(64, rngs=rngs))

    def cost(frames):
        shapes = [((1, frames, 64), float), ((1, 64), float), ((1, frames), float), ((1, frames), bool)]
        arrays = [jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for shape, dtype in shapes]
        compiled = jax.jit(lambda params, *x: merge_params(graphdef, params)(*x)).lower(params, *arrays).compile()
        return compiled.cost_analysis()["flops"], compiled.memory_analysis().temp_size_in_bytes

    for small, large in zip(cost(1024), cost(2048), strict=True):
        assert large < 2.2 * small


def test_export_and_back(golden, plain_clip, trained, tmp_path):
    params = trained[1]
    export(params, plain_clip, tmp_path / "out")
    names = weights.SafetensorsFolder(tmp_path / "out").names()
    own = {name for name in names if name.startswith("question_aware_selector.")}
    assert len(own) == 18 and not any(name.startswith("selector.") for name in names)
    assert weights.read_config(tmp_path / "out")["architectures"] == ["QuestionAwareTSPOModel"]
    graphdef, back = load_agent(tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, back, params)
    assert graphdef == agent_graphdef(params, 64) == trained[0]
    assert weights.checkpoint_identity(tmp_path / "out") == weights.checkpoint_identity(plain_clip)
    with pytest.raises(CheckpointError, match="its agent is question_aware, it cannot be used as paper"):
        load_agent(tmp_path / "out", kind="paper")
    with pytest.raises(CheckpointError, match="8 heads and window 12, not 8 heads and window 16"):
        load_agent(tmp_path / "out", window=16)
    export(load_agent(golden / "tspo_agent")[1], tmp_path / "out", tmp_path / "paper")
    assert not any(name.startswith("question_aware") for name in weights.SafetensorsFolder(tmp_path / "paper").names())


# ---- what comes right after X ----

D, T, K, LENGTH = 64, 64, 8, 6


def relating_questions(rng, B):
    """Videos of concepts shown for 6 frames each, and "what comes right after X" about each.

    As CLIP has it, all pictures share most of their direction, all texts another one, so the cosines of a video differ
    by a few hundredths. Returns features [B,T,D] of norm 10, text [B,D] and what is right, bool [B,T].
    """
    world = np.random.default_rng(0)
    concepts, after = np.split(world.normal(size=(31, D)) / np.sqrt(D), [30])
    pictures, texts = np.linalg.qr(world.normal(size=(D, 2)))[0].T
    shown = np.array([rng.permutation(30)[: T // LENGTH + 1] for _ in range(B)])
    at = rng.integers(0, T // LENGTH - 1, B)
    asked, right = shown[np.arange(B), at], shown[np.arange(B), at + 1]
    in_frame = np.repeat(shown, LENGTH, axis=1)[:, :T]

    def towards(shared, vectors):
        vectors = 3 * shared + vectors
        return (10 * vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)

    features = towards(pictures, concepts[in_frame] + 0.5 * rng.normal(size=(B, T, D)) / np.sqrt(D))
    return features, towards(0.2 * pictures + texts, concepts[asked] + 0.7 * after), in_frame == right[:, None]


def found_after_training(kind, num_steps=300):
    """Share of held-out questions with a right frame among the top K, before and after training with labels."""
    graphdef, params = split_params(kind(D, rngs=nnx.Rngs(0)))
    optimizer = policy.make_optimizer(num_steps, peak_learning_rate=3e-3)
    opt_state, rng = optimizer.init(params), np.random.default_rng(1)

    def score(params, features, text):
        mask = jnp.ones(features.shape[:2], bool)
        return merge_params(graphdef, params)(features, text, cosine_similarity(text, features), mask, 0.025)

    @jax.jit
    def step(params, opt_state, features, text, right):
        def loss(params):
            log_probs = jax.nn.log_softmax(score(params, features, text))
            return -jax.nn.logsumexp(jnp.where(right, log_probs, -jnp.inf), axis=-1).mean()

        updates, opt_state = optimizer.update(jax.grad(loss)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    features, text, right = relating_questions(np.random.default_rng(2), 256)

    def found(params):
        top = jax.lax.top_k(jax.jit(score)(params, features, text), K)[1]
        return np.take_along_axis(right, np.asarray(top), axis=1).any(1).mean()

    before = found(params)
    for _ in range(num_steps):
        params, opt_state = step(params, opt_state, *relating_questions(rng, 16))
    return before, found(params)


@pytest.mark.slow
def test_relating_is_learned_where_the_papers_agent_cannot():
    before, paper = found_after_training(TemporalAgent)
    same, question_aware = found_after_training(QuestionAwareAgent)
    assert before == same < 0.5 and paper < 0.6 and question_aware > 0.9
