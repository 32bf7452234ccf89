"""The span agent: the question-aware one at first, and what its edges can learn."""

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
from tspo_jax.models.clip import cosine_similarity
from tspo_jax.models.layers import merge_params, split_params
from tspo_jax.models.span_agent import SpanAgent, matches_beside, reaches
from tspo_jax.selection import scoring
from tspo_jax.selection.methods import uniform
from tspo_jax.selection.spans import best_span, frames_of_span
from tspo_jax.tspo.span_loss import longest_run, span_loss

D = 32


def videos(number, T=40, seed=0):
    """Features [B, T, D], questions [B, D] and labels bool [B, T]: in a stretch of 4 to 12 frames the frames point half
    towards the question; a few others do so as well, each alone."""
    rng = np.random.default_rng(seed)
    text, features = rng.normal(size=(number, D)), rng.normal(size=(number, T, D))
    labels, likes = np.zeros((number, T), bool), rng.random((number, T)) < 0.08
    for row, length in enumerate(rng.integers(4, 13, number)):
        start = rng.integers(0, T - length)
        labels[row, start : start + length] = True
    features += 0.8 * (labels | likes)[..., None] * text[:, None]
    return features.astype(np.float32), text.astype(np.float32), labels


def overlap(span, labels):
    """Intersection over union."""
    predicted = (np.arange(len(labels)) >= span[0]) & (np.arange(len(labels)) <= span[1])
    return np.sum(predicted & labels) / np.sum(predicted | labels)


@pytest.mark.slow
def test_at_first_it_is_the_question_aware_one(golden):
    features, text, labels = videos(2)
    wide = np.concatenate([features, features], axis=-1), np.concatenate([text, text], axis=-1)
    mask = np.arange(40) < np.array([[40], [30]])
    clip_scores = cosine_similarity(wide[1], wide[0])
    agents = {kind: load_agent(golden / "tspo_agent", kind=kind) for kind in ("question_aware", "span")}
    found = {kind: merge_params(*agent)(*wide, clip_scores, mask) for kind, agent in agents.items()}
    np.testing.assert_array_equal(found["span"], found["question_aware"])
    both = merge_params(*agents["span"]).span_logits(*wide[:1], wide[1], clip_scores, mask)
    np.testing.assert_array_equal(both, np.repeat(found["span"][..., None], 2, axis=-1))
    assert np.all(np.isneginf(both[1, 30:])) and np.all(np.isfinite(both[1, :30]))
    first, last = best_span(*np.asarray(both[0]).T)
    assert first == last == np.argmax(found["span"][0])


@pytest.mark.slow
def test_it_learns_where_the_evidence_begins_and_ends():
    """On labelled videos, new ones at each step; of others its spans overlap most of the evidence, and its frames lie
    in it more often than evenly spaced ones."""
    graphdef, params = split_params(SpanAgent(D, num_heads=4, window=12, rngs=nnx.Rngs(0)))

    def logits(params, features, text):
        mask = jnp.ones(features.shape[:2], bool)
        agent = merge_params(graphdef, params)
        return agent.span_logits(features, text, cosine_similarity(text, features), mask, 0.1)

    @jax.jit
    def update(params, moments, features, text, labels):
        loss = lambda params: span_loss(logits(params, features, text), *longest_run(labels))  # noqa: E731
        changes, moments = optimizer.update(jax.grad(loss)(params), moments)
        return optax.apply_updates(params, changes), moments

    optimizer = optax.adam(3e-3)
    moments = optimizer.init(params)
    features, text, truth = videos(128, seed=10**6)
    of_others = jax.jit(lambda params: logits(params, features, text))

    def spans():
        return [best_span(*np.asarray(one).T) for one in of_others(params)]

    before = np.mean([overlap(*pair) for pair in zip(spans(), truth, strict=True)])
    for step in range(300):
        params, moments = update(params, moments, *videos(32, seed=step))
    after = np.mean([overlap(*pair) for pair in zip(spans(), truth, strict=True)])
    assert before < 0.3 and after > 0.5, (before, after)
    picks = [frames_of_span(span, 40, 4) for span in spans()]
    inside = np.mean([row[pick].mean() for row, pick in zip(truth, picks, strict=True)])
    assert inside > 0.6 > 0.3 > np.mean([row[uniform(row, 4)].mean() for row in truth])


def test_matches_beside_a_frame():
    scores = jnp.array([[0.0, 1.0, 2.0, 6.0, 9.0], [1.0, 3.0, 0.0, 0.0, 0.0]])
    mask = np.arange(5) < np.array([[4], [2]])  # means 2.25 and 2
    assert reaches(5) == [-1, -1, -2, 1, 1, 2] and reaches(12) == [-1, -3, -6, 1, 2, 5]
    near = matches_beside(scores, mask, 5)
    np.testing.assert_allclose(near[0, 2], [-1.25, -1.25, (-1.25 - 2.25) / 2, 3.75, 3.75, 3.75 / 2])
    np.testing.assert_allclose(near[0, 0], [0, 0, 0, -1.25, -1.25, (-1.25 - 0.25) / 2])
    np.testing.assert_allclose(near[1, 1], [-1, -1, -0.5, 0, 0, 0])


def test_the_longest_run_of_labels():
    labels = np.array([[0, 1, 1, 0, 1, 1, 1], [1, 1, 0, 1, 1, 0, 0], [0] * 7, [1] * 7], bool)
    first, last = longest_run(jnp.asarray(labels))
    assert first.tolist() == [4, 0, 7, 0] and last.tolist() == [6, 1, 7, 6]


@pytest.fixture(scope="module")
def folder(golden, tmp_path_factory):
    """An exported span agent with edges."""
    _, params = load_agent(golden / "tspo_agent", kind="span")
    rng = np.random.default_rng(1)
    params["edge_weight"] = jax.tree.map(lambda x: 0.1 * rng.normal(size=x.shape), params["edge_weight"])
    output = tmp_path_factory.mktemp("span") / "agent"
    export(params, golden / "tspo_agent", output)
    return output, params


def test_exported_and_read(folder, golden):
    output, params = folder
    names = weights.SafetensorsFolder(output).names()
    assert sum(name.startswith("span_selector.") for name in names) == len(weights.flatten(params))
    graphdef, again = load_agent(output)
    assert graphdef == agent_graphdef(again, 64)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), again, params)
    with pytest.raises(CheckpointError, match="its agent is span, it cannot be used as question_aware"):
        load_agent(output, kind="question_aware")


def test_the_method_takes_frames_of_the_span(folder, golden):
    scorer = scoring.load_scorer(folder[0])
    rng = np.random.default_rng(2)
    features, text = rng.normal(size=(20, 64)).astype(np.float32), rng.normal(size=64).astype(np.float32)
    scores = scorer(features, text)
    picks = scoring.pick_by(scorer, "span", features, text, scores, 3)
    np.testing.assert_array_equal(picks, frames_of_span(scorer.span(features, text), 20, 3))
    assert scoring.pick_by(scorer, "span", features, text, scores, 30).tolist() == list(range(20))
    np.testing.assert_array_equal(
        scoring.pick_by(scorer, "topk", features, text, scores, 3), scoring.pick("topk", *scores, 3)
    )
    with pytest.raises(ValueError, match="the logits of 20 candidates are not finite"):
        scorer.span(np.full_like(features, np.nan), text)
    with pytest.raises(ValueError, match="predicts no spans"):
        scoring.check_method(scoring.load_scorer(golden / "tspo_agent"), "span")
