"""Answers packed behind one prompt are the same as sequences of their own, gradients included."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tspo_jax.answering import prompts
from tspo_jax.models import packed_answers
from tspo_jax.models.layers import merge_params, split_params
from tspo_jax.models.llava_video import LlavaVideo, LlavaVideoConfig
from tspo_jax.models.qwen2 import Qwen2Config
from tspo_jax.models.qwen2_5_vl import Qwen25VL, Qwen25VLConfig, QwenVisionConfig
from tspo_jax.models.siglip import SiglipConfig
from tspo_jax.models.video_prompt import VIDEO_TOKEN

VOCABULARY = 50
LANGUAGE = Qwen2Config(VOCABULARY, 32, 48, 2, 4, 2)


def llava_video(language=LANGUAGE):
    vision = SiglipConfig(16, 24, 1, 2, 12, 4)
    return LlavaVideo(LlavaVideoConfig(language, vision), rngs=nnx.Rngs(0)), (2, 12, 12, 3)


def qwen2_5_vl(language=LANGUAGE):
    vision = QwenVisionConfig(
        depth=2, hidden_size=16, intermediate_size=24, num_heads=2, out_hidden_size=32, window_size=56
    )
    return Qwen25VL(Qwen25VLConfig(language, vision, (2, 1, 1)), rngs=nnx.Rngs(0)), (4, 56, 84, 3)


PROMPTS = [[1, 2, VIDEO_TOKEN, 3, 4, 5, 6], [7, VIDEO_TOKEN, 8]]
ANSWERS = [[[9, 10, 11, 12, 13], [14]], [[15, 16], [17, 18, 19]]]


def log_probs_packed(graphdef, params, pixels, ids, lengths, answers, counts):
    model = merge_params(graphdef, params)
    tokens = model.encode_frames(pixels.reshape(-1, *pixels.shape[2:]))
    prompt = model.prompt(tokens.reshape(len(pixels), -1, *tokens.shape[1:]), ids, lengths)
    hidden = packed_answers.answer_states(model, prompt, answers)
    return jnp.where(counts, packed_answers.token_log_probs(model.language_model, hidden, answers), 0)


def log_probs_alone(graphdef, params, pixels, prompt, answer):
    """Token log-probabilities of one answer, its tokens simply written behind the prompt."""
    model = merge_params(graphdef, params)
    tokens = model.encode_frames(pixels)[None]
    ids = jnp.array([[*prompt, *answer]])
    p = model.prompt(tokens, ids, jnp.array([ids.shape[1]]))
    slots = jnp.arange(p.embeddings.shape[1])[None]
    hidden, _ = model.language_model(p.embeddings, slots, angles=model.angles(p.positions))
    logits = model.language_model.logits(hidden)[0, -len(answer) - 1 : -1]
    return jax.nn.log_softmax(logits)[jnp.arange(len(answer)), jnp.array(answer)]


def batch(model, shape):
    pixels = jax.random.normal(jax.random.key(1), (len(PROMPTS), *shape))
    ids, lengths = prompts.pad(PROMPTS, 0)
    answers, counts = prompts.pad([answer for pair in ANSWERS for answer in pair], 3)
    answers, counts = answers.reshape(len(PROMPTS), 2, -1), counts.reshape(-1, 2)
    return pixels, ids, lengths, answers, np.arange(answers.shape[-1]) < counts[..., None]


@pytest.mark.parametrize("make, block", [(llava_video, 4), (qwen2_5_vl, packed_answers.QUERY_BLOCK)])
@pytest.mark.slow
def test_packed_equals_sequences_of_their_own(make, block, monkeypatch):
    monkeypatch.setattr(packed_answers, "QUERY_BLOCK", block)
    model, shape = make()
    graphdef, params = split_params(model)
    arrays = batch(model, shape)
    weights = jax.random.normal(jax.random.key(2), arrays[-1].shape)  # another one for each token

    @jax.jit
    def packed(params):
        values = log_probs_packed(graphdef, params, *arrays)
        return jnp.vdot(values, weights), values

    @jax.jit
    def alone(params):
        total, values = 0.0, []
        for b, (prompt, pair) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
            for s, answer in enumerate(pair):
                values.append(log_probs_alone(graphdef, params, arrays[0][b], prompt, answer))
                total += jnp.vdot(values[-1], weights[b, s, : len(answer)])
        return total, values

    (_, found), gradient = jax.value_and_grad(packed, has_aux=True)(params)
    (_, wanted), expected = jax.value_and_grad(alone, has_aux=True)(params)
    for values, other in zip(np.asarray(found).reshape(-1, found.shape[-1]), wanted, strict=True):
        np.testing.assert_allclose(values[: len(other)], other, atol=1e-5)
        assert not values[len(other) :].any()
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), gradient, expected)


@pytest.mark.slow
def test_tied_head():
    model, shape = llava_video(Qwen2Config(VOCABULARY, 32, 48, 1, 4, 2, tie_word_embeddings=True))
    graphdef, params = split_params(model)
    arrays = batch(model, shape)
    found = log_probs_packed(graphdef, params, *arrays)
    wanted = log_probs_alone(graphdef, params, arrays[0][0], PROMPTS[0], ANSWERS[0][0])
    np.testing.assert_allclose(found[0, 0], wanted, atol=1e-5)


def test_padding_is_not_looked_at():
    model, shape = llava_video()
    graphdef, params = split_params(model)
    pixels, ids, lengths, answers, counts = batch(model, shape)
    run = jax.jit(partial(log_probs_packed, graphdef))
    other_ids = np.where(np.arange(ids.shape[1]) < lengths[:, None], ids, 20)
    other_answers = np.where(counts, answers, 21)
    assert (other_ids != ids).any() and (other_answers != answers).any()
    found = run(params, pixels, ids, lengths, answers, counts)
    np.testing.assert_array_equal(run(params, pixels, other_ids, lengths, other_answers, counts), found)
