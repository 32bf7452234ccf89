import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from toy_bank import conversation_tokenizer

from tspo_jax.answering import prompts
from tspo_jax.checkpoints.folders import load_answerer
from tspo_jax.models.layers import merge_params
from tspo_jax.models.qwen2 import rope_angles
from tspo_jax.models.video_prompt import FrameTimes
from tspo_jax.toy.tiny_answerers import CONSTANT, CONSTANT_VALUE, IMAGE_SIZE, TINY_ANSWERERS

pytestmark = pytest.mark.slow  # a training or a whole evaluation, or the making of a model, before the first test


@pytest.fixture(scope="module", params=list(TINY_ANSWERERS))
def made(request, tmp_path_factory):
    """A family, its untrained answerer, and that from the folder that was saved."""
    tiny = TINY_ANSWERERS[request.param]
    answerer = tiny.untrained(conversation_tokenizer(request.param), tmp_path_factory.mktemp(request.param), 0)
    tiny.save(answerer)
    return tiny, answerer, load_answerer(answerer.folder)


def test_loads_back(made):
    tiny, answerer, loaded = made
    for field in ("config", "processor", "template", "folder"):
        assert getattr(loaded, field) == getattr(answerer, field), field
    assert loaded.generation.eos_token_ids == answerer.generation.eos_token_ids
    assert loaded.generation.pad_token_id == answerer.generation.pad_token_id
    assert loaded.generation.repetition_penalty == 1.0
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a, np.asarray(b).astype(ml_dtypes.bfloat16)),
        loaded.params,
        answerer.params,
    )
    assert sum(path.stat().st_size for path in answerer.folder.iterdir()) < 3e6
    for token in tiny.special_tokens.values():
        assert len(loaded.tokenizer(token)["input_ids"]) == 1


def test_frames_have_one_size_however_many_they_are(made):
    _, _, loaded = made
    for num_frames in (1, 4, 64):
        processor = loaded.processor.for_frames(num_frames)
        assert processor.crop(np.zeros((96, 96, 3), np.uint8)).shape == (IMAGE_SIZE, IMAGE_SIZE, 3)
        tokens = loaded.config.num_visual_tokens(num_frames, IMAGE_SIZE, IMAGE_SIZE)
        assert tokens <= num_frames * (6 if loaded.folder.name.startswith("llava_video_2x2") else 2)


def attention_weights(answerer, layer, x):
    """Of states [N, D] at positions 0..N-1: [heads, N, N], causal."""
    cfg, N = answerer.config.language, len(x)
    attention = merge_params(answerer.graphdef, answerer.params).language_model.layers.self_attn
    attention = jax.tree.map(lambda p: p[layer], attention)
    x = (x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True)))[None]
    angles = rope_angles(jnp.arange(N)[None], cfg.head_dim, cfg.rope_theta)
    q, k = attention.queries(x, angles)[0], attention.keys_values(x, angles)[0][0]
    k = jnp.repeat(k, cfg.num_attention_heads // cfg.num_key_value_heads, axis=1)
    scores = jnp.einsum("nhd,mhd->hnm", q, k) / cfg.head_dim**0.5
    return np.asarray(jax.nn.softmax(jnp.where(jnp.tril(jnp.ones((N, N), bool)), scores, -jnp.inf), axis=-1))


def test_attention_starts_out_finding_its_like_and_what_came_before(made):
    _, answerer, _ = made
    language, cfg = answerer.params["language_model"], answerer.config.language
    words = np.random.default_rng(0).normal(size=(12, cfg.hidden_size)).astype(np.float32)
    if cfg.use_qk_norm:
        words[:, CONSTANT] = CONSTANT_VALUE
    shown = np.arange(24) % 12  # every word twice
    for layer in range(cfg.num_hidden_layers):
        weights = attention_weights(answerer, layer, words[shown])
        like = np.sum(weights[:, 12:] * (shown[12:, None] == shown), axis=-1).mean(axis=1)
        assert np.all(like[:2] > 0.5), layer  # the first key head's two queries
        if layer < 2:
            for head, offset in ((2, 1), (3, 2)):
                assert np.mean([weights[head, n, n - offset] for n in range(2, 24)]) > 0.5, (layer, head)
    # What the first layer says about the word two before is what the third looks for.
    attention = language["layers"]["self_attn"]
    d = cfg.head_dim
    said = words @ attention["v_proj"]["kernel"][0, :, -d:] @ attention["o_proj"]["kernel"][0, -d:]
    keys = said @ attention["k_proj"]["kernel"][2, :, -d:]
    queries = words @ attention["q_proj"]["kernel"][2, :, -d:]
    assert np.mean(np.argmax(queries @ keys.T, axis=1) == np.arange(12)) > 0.8
    embedding = language["embed_tokens"]["embedding"]
    logits = embedding @ language["lm_head"]["kernel"]
    np.testing.assert_array_equal(np.argmax(logits, axis=-1), np.arange(len(answerer.tokenizer)))


@pytest.mark.parametrize("made", ["qwen3_vl"], indirect=True)
def test_every_token_of_a_fresh_qwen3_vl_has_the_constant(made):
    """Text and frames, behind every layer: what the heads that look back rest on."""
    _, answerer, _ = made
    written = answerer.config.write_times(prompts.render("Why?", answerer.template), FrameTimes.of([3.5, 70, 120]))
    ids = jnp.asarray([prompts.tokenize(written, answerer.tokenizer)])

    @jax.jit
    def states(params):
        model = merge_params(answerer.graphdef, params)
        pixels = jax.random.normal(jax.random.key(0), (3, IMAGE_SIZE, IMAGE_SIZE, 3))
        prompt = model.prompt(model.encode_frames(pixels)[None], ids, jnp.array([ids.shape[1]]))
        model.language_model.norm = lambda x: x
        slots, angles = jnp.arange(prompt.embeddings.shape[1])[None], model.angles(prompt.positions)
        return prompt.embeddings, model.language_model(prompt.embeddings, slots, angles=angles, added=prompt.added)[0]

    for found in states(answerer.params):
        np.testing.assert_allclose(found[..., CONSTANT], CONSTANT_VALUE, rtol=1e-5)
        assert np.std(found[..., CONSTANT + 1]) > 0.1
