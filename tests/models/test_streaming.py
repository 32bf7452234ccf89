import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tspo_jax.checkpoints.weights import flatten, unflatten
from tspo_jax.devices import sharding
from tspo_jax.models.gumbel_top_k import gumbel_noise
from tspo_jax.models.layers import abstract_module, merge_params, split_params
from tspo_jax.models.qwen2 import KVCache, Qwen2
from tspo_jax.models.streaming import Memories, StreamingConfig, StreamingEncoder

CFG = StreamingConfig(
    feature_width=6,
    answerer_width=10,
    frames=2,
    cells=1,
    width=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    hidden=24,
    selected=2,
)
B, K, P = 3, 5, 4
COUNTS = np.array([5, 3, 4])
IS_CLIP = np.arange(K) < COUNTS[:, None]
RNG = np.random.default_rng(0)
CLIPS = RNG.normal(size=(B, K, CFG.frames, P, CFG.feature_width)).astype(np.float32)
TIMES = np.stack([np.arange(K) * 2.0, np.arange(K) * 2.0 + 2], -1)[None].repeat(B, 0).astype(np.float32)
WORDS = RNG.normal(size=(B, 4, CFG.answerer_width)).astype(np.float32)
LENGTHS = np.array([4, 2, 3])


@pytest.fixture(scope="module")
def model() -> StreamingEncoder:
    """Large weights, so that every input matters."""
    graphdef, abstract = abstract_module(lambda rngs: StreamingEncoder(CFG, rngs=rngs))
    rng = np.random.default_rng(1)
    return merge_params(graphdef, jax.tree.map(lambda p: 0.3 * rng.normal(size=p.shape).astype(np.float32), abstract))


@jax.jit
def encode(model, clips, times, is_clip, memory=None):
    return model.encode(clips, times, is_clip, memory)


@jax.jit
def push(model, memory, clip, times, is_clip):
    return model.push(memory, clip, times, is_clip)


@jax.jit
def select(model, stream, is_clip, noise=None):
    return model.select(WORDS, LENGTHS, stream, is_clip, noise)


@pytest.fixture(scope="module")
def stream(model) -> Memories:
    return encode(model, CLIPS, TIMES, IS_CLIP)


def test_memory_is_constant(model):
    """Property 1: what `push` takes, gives and needs does not depend on how many clips there were."""
    memory = model.first_memory(1)

    def compiled(model, memory, clip, times, is_clip):
        return jax.jit(StreamingEncoder.push).lower(model, memory, clip, times, is_clip).compile()

    one = compiled(model, memory, CLIPS[:1, 0], TIMES[:1, 0], IS_CLIP[:1, 0])
    late = jnp.full((1, 2), 36_000.0)
    for k in range(3):
        memory, _ = one(model, memory, CLIPS[:1, k], late, IS_CLIP[:1, 0])
        assert memory.shape == (1, CFG.summary, CFG.width)
    assert CFG.num_visual_tokens == (CFG.selected + 1) * CFG.summary
    bank = jnp.zeros((1, CFG.selected, CFG.summary, CFG.width))
    tokens = jax.eval_shape(StreamingEncoder.visual_tokens, model, bank, memory)
    assert tokens.shape == (1, CFG.num_visual_tokens, CFG.answerer_width)


def test_encode_is_push_after_push(model, stream):
    """Property 2, with a batch of videos of different length."""
    memory = model.first_memory(B)
    for k in range(K):
        memory, indicator = push(model, memory, CLIPS[:, k], TIMES[:, k], IS_CLIP[:, k])
        there = IS_CLIP[:, k]
        np.testing.assert_allclose(stream.memories[there, k], memory[there], atol=1e-5)
        np.testing.assert_allclose(stream.indicators[there, k], indicator[there], atol=1e-5)
    np.testing.assert_allclose(stream.last, memory, atol=1e-5)
    np.testing.assert_array_equal(stream.last[1], stream.memories[1, COUNTS[1] - 1])  # padding changes nothing


def test_encode_goes_on_from_a_memory(model, stream):
    first = encode(model, CLIPS[:, :2], TIMES[:, :2], IS_CLIP[:, :2])
    rest = encode(model, CLIPS[:, 2:], TIMES[:, 2:], IS_CLIP[:, 2:], first.last)
    np.testing.assert_allclose(rest.last, stream.last, atol=1e-5)
    np.testing.assert_allclose(
        np.concatenate([first.indicators, rest.indicators], 1)[IS_CLIP], stream.indicators[IS_CLIP], atol=1e-5
    )
    alone = encode(model, CLIPS[1:2, :3], TIMES[1:2, :3], IS_CLIP[1:2, :3])
    np.testing.assert_allclose(alone.last[0], stream.last[1], atol=1e-5)


def test_causality(model, stream):
    """Property 3: what was before a clip does not know it."""
    changed = CLIPS.copy()
    changed[:, 2, 1, 3] += 1.0
    other = encode(model, changed, TIMES, IS_CLIP)
    np.testing.assert_array_equal(other.memories[:, :2], stream.memories[:, :2])
    np.testing.assert_array_equal(other.indicators[:, :2], stream.indicators[:, :2])
    assert np.abs(other.memories[:, 2] - stream.memories[:, 2]).max() > 1e-3
    assert np.abs(other.last[0] - stream.last[0]).max() > 1e-5


def test_indicator_sees_the_summary_alone(model, monkeypatch):
    """Property 3: a clip changes its indicator only through its mean and the summary; with the summary's keys and
    values held fixed, patches that change places in their cell do not change it."""
    memory, original = model.first_memory(B), Qwen2.behind
    clip = CLIPS[:, 0]
    moved = clip[:, :, ::-1]  # one cell a frame: the means stay
    seen = []

    def spy(self, embedding, position, summary):
        seen.append(jax.tree.map(jnp.shape, summary))
        return original(self, embedding, position, summary)

    monkeypatch.setattr(Qwen2, "behind", spy)
    indicator = jax.jit(lambda *args: model.push(*args)[1])
    before, after = (indicator(memory, x, TIMES[:, 0], IS_CLIP[:, 0]) for x in (clip, moved))
    shapes = seen[0]
    assert {shape[2] for shape in (*shapes.k, *shapes.v)} == {CFG.summary}
    assert np.abs(before - after).max() > 1e-5

    fixed = KVCache(*(tuple(RNG.normal(size=shape).astype(np.float32) for shape in part) for part in shapes))
    monkeypatch.setattr(Qwen2, "behind", lambda self, e, p, _: original(self, e, p, fixed))
    indicator = jax.jit(lambda *args: model.push(*args)[1])
    before, after = (indicator(memory, x, TIMES[:, 0], IS_CLIP[:, 0]) for x in (clip, moved))
    np.testing.assert_allclose(before, after, atol=1e-5)


def test_selection(model, stream):
    """Property 4, forwards: distinct clips in the order of time, none where there is none, and no noise = the same."""
    noise = gumbel_noise(jax.random.split(jax.random.key(0), B), 1, K)[:, 0]
    for chosen in (select(model, stream, IS_CLIP, noise), select(model, stream, IS_CLIP)):
        assert np.all(np.diff(chosen.picks) > 0) and np.all(chosen.picks < COUNTS[:, None])
        expected = np.take_along_axis(np.asarray(stream.memories), np.asarray(chosen.picks)[..., None, None], axis=1)
        np.testing.assert_allclose(chosen.memories, expected, atol=1e-6)
        assert np.isneginf(chosen.scores[~IS_CLIP]).all()
        assert np.abs(chosen.scores[IS_CLIP]).max() <= 1 / CFG.temperature + 1e-4
    np.testing.assert_array_equal(select(model, stream, IS_CLIP).memories, chosen.memories)
    one = select(model, stream, np.arange(K) < np.ones((B, 1)))
    assert np.asarray(one.picks).tolist() == [[0, K]] * B and not np.any(one.memories[:, 1])


def test_selection_has_gradients(model, stream):
    """Property 4, backwards: an answer's gradient reaches the question's way, the indicators and the encoder."""
    noise = gumbel_noise(jax.random.split(jax.random.key(0), B), 1, K)[:, 0]
    graphdef, params = split_params(model)

    @jax.jit
    def gradients(params, indicators):
        def loss(params, indicators):
            model = merge_params(graphdef, params)
            stream = model.encode(CLIPS, TIMES, IS_CLIP)
            chosen = model.select(WORDS, LENGTHS, stream._replace(indicators=indicators), IS_CLIP, noise)
            return model.visual_tokens(chosen.memories, stream.last).sum()

        return jax.grad(loss, argnums=(0, 1))(params, indicators)

    of_params, of_indicators = gradients(params, stream.indicators)
    assert np.abs(of_indicators[IS_CLIP]).max() > 1e-6 and not np.any(of_indicators[~IS_CLIP])
    for part in (of_params["question"], of_params["feature_mlp"], of_params["language_model"]["layers"]):
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(part))
        assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(part)) > 1e-6
    table = of_params["language_model"]["embed_tokens"]["embedding"]
    assert np.abs(table[CFG.summary + 1]).max() > 1e-8  # the question's learned vector: only the scores read it


def test_words_behind_the_question_do_not_count(model, stream):
    words = WORDS.copy()
    words[1, 2:] = 9.0
    scores = jax.jit(StreamingEncoder.scores)(model, words, LENGTHS, stream.last, stream.indicators, IS_CLIP)
    np.testing.assert_allclose(scores[IS_CLIP], select(model, stream, IS_CLIP).scores[IS_CLIP], atol=1e-5)


@pytest.mark.slow
def test_no_propagation_and_cut_gradients(model):
    alone, _ = push(model, model.first_memory(B), CLIPS[:, 1], TIMES[:, 1], IS_CLIP[:, 1])
    apart = jax.jit(lambda model, *args: model.encode(*args, propagate=False))(model, CLIPS, TIMES, IS_CLIP)
    np.testing.assert_allclose(apart.memories[:, 1], alone, atol=1e-5)

    def last(clips, cut_every):
        return model.encode(clips, TIMES, np.ones((B, K), bool), cut_every=cut_every).last.sum()

    whole, cut = (jax.jit(jax.grad(last), static_argnums=1)(CLIPS, n) for n in (0, 2))
    assert np.abs(whole[:, :4]).max() > 1e-6 and not np.any(cut[:, :4])
    np.testing.assert_allclose(cut[:, 4], whole[:, 4], atol=1e-6)


def test_sharded_equals_unsharded(model, stream):
    mesh = sharding.make_mesh([("data", 4), ("model", 2)], jax.devices())
    graphdef, params = split_params(model)
    where = sharding.ParamSharding(mesh, {name: "model" for name in ("heads", "hidden", "vocabulary")})
    flat = {path: jax.device_put(leaf, where(path, leaf.shape)) for path, leaf in flatten(params).items()}
    four = [np.concatenate([x, x[:1]]) for x in (CLIPS, TIMES, IS_CLIP)]
    batch = sharding.put_batch(mesh, four)
    found = jax.jit(lambda p, *batch: merge_params(graphdef, p).encode(*batch))(unflatten(flat), *batch)
    np.testing.assert_allclose(found.last[:B], stream.last, atol=1e-5)
    np.testing.assert_allclose(np.asarray(found.indicators)[:B][IS_CLIP], stream.indicators[IS_CLIP], atol=1e-5)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"cells": 2}, "no square"), ({"width": 15}, "do not divide"), ({"selected": 0}, "selected is 0")],
)
def test_sizes_that_do_not_fit(wrong, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CFG, **wrong)


def test_clips_that_do_not_fit(model):
    with pytest.raises(ValueError, match="3 frames of 4 patches"):
        push(model, model.first_memory(B), np.zeros((B, 3, 4, 6), np.float32), TIMES[:, 0], IS_CLIP[:, 0])
    with pytest.raises(ValueError, match="2 frames of 5 patches"):
        push(model, model.first_memory(B), np.zeros((B, 2, 5, 6), np.float32), TIMES[:, 0], IS_CLIP[:, 0])
