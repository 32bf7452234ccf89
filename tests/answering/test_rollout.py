"""Groups of answers: the original's tokens, batches against single prompts, early end, repetition penalty."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tspo_jax.answering import prompts
from tspo_jax.answering.rollout import Rollout, greedy_decode, unique_frames
from tspo_jax.checkpoints.folders import Generation, answerer_architecture, load_answerer
from tspo_jax.devices.program_cost import Program, arithmetic

FOLDERS = ("llava_video_grid", "llava_video_one_token")


@pytest.fixture(scope="module")
def answerers(golden):
    return {name: load_answerer(golden / name) for name in FOLDERS}


def cropped(answerer, frames):
    return np.stack([answerer.processor.crop(frame) for frame in frames])


def golden_cases(golden, name):
    arrays = np.load(golden / f"{name}.npz")
    return [
        (case["question"], arrays[f"case{case['case']}/frames"], arrays[f"case{case['case']}/generated"])
        for case in json.loads(str(arrays["meta"]))
    ]


@pytest.fixture
def group(answerers):
    """Two questions of different lengths, three groups each that share frames of six."""
    answerer = answerers["llava_video_grid"]
    rng = np.random.default_rng(0)
    texts = [prompts.render("Who opens the door?\nA. The cat\nB. A dog"), prompts.render("Why?", suffix="")]
    ids, lengths = prompts.pad([prompts.tokenize(text, answerer.tokenizer) for text in texts], 257, multiple=64)
    frames = rng.integers(0, 256, (2, 6, 28, 28, 3)).astype(np.uint8)
    index = np.sort(np.stack([[rng.permutation(6)[:4] for _ in range(3)] for _ in range(2)]), axis=-1)
    return answerer, frames, index, ids, lengths


@pytest.mark.parametrize("name", FOLDERS)
def test_tokens_of_the_original_with_padded_prompts(golden, answerers, name):
    answerer = answerers[name]
    cases = golden_cases(golden, name)
    texts = [prompts.render(question) for question, _, _ in cases] + [prompts.render("A longer one?" * 30)]
    ids, lengths = prompts.pad([prompts.tokenize(text, answerer.tokenizer) for text in texts], 257, multiple=128)
    frames = np.stack([cropped(answerer, frames) for _, frames, _ in cases] + [cropped(answerer, cases[0][1])])
    B, K = frames.shape[:2]
    index = np.broadcast_to(np.arange(K), (B, 1, K))
    answers = Rollout.of(answerer, max_new_tokens=6)(answerer.params, frames, index, ids, lengths)
    for b, (_, _, generated) in enumerate(cases):
        assert answers.lengths[b, 0] == 6
        np.testing.assert_array_equal(answers.tokens[b, 0], generated)


@pytest.mark.slow
def test_batch_answers_as_each_prompt_alone(group):
    answerer, frames, index, ids, lengths = group
    # Chunks of 4 of the 6 frames, a prompt of each question at a time; alone, unpadded, the frames are encoded per
    # prompt and without chunks.
    answers = Rollout.of(answerer, max_new_tokens=5, encode_chunk=4, prefill_chunk=1, return_first_logits=True)(
        answerer.params, frames, index, ids, lengths
    )
    alone = Rollout.of(answerer, max_new_tokens=5, return_first_logits=True)
    for b in range(2):
        for g in range(3):
            one = alone(
                answerer.params,
                frames[b, index[b, g]][None],
                np.arange(4)[None, None],
                ids[b : b + 1, : lengths[b]],
                lengths[b : b + 1],
            )
            np.testing.assert_array_equal(one.tokens[0, 0], answers.tokens[b, g])
            np.testing.assert_allclose(one.first_logits[0, 0], answers.first_logits[b, g], atol=1e-4)
    assert alone.num_compilations == 2  # one for each length of prompt


def test_frames_behind_the_last_used_one_are_not_encoded(group):
    answerer, frames, index, ids, lengths = group
    calls = []

    def counted(pixels):
        jax.debug.callback(lambda: calls.append(len(pixels)))
        return answerer.processor.normalize(pixels)

    rollout = Rollout(answerer.graphdef, counted, answerer.generation, max_new_tokens=1, encode_chunk=2)
    padding = np.zeros_like(frames)
    few = rollout(answerer.params, np.concatenate([frames, padding], 1), index, ids, lengths)
    jax.block_until_ready(few)
    jax.effects_barrier()
    assert calls == [4, 4, 4]  # three chunks of 2 frames for each of 2 questions, of the 12 that were passed
    fewer = rollout(answerer.params, np.concatenate([frames, padding], 1), index.clip(0, 1), ids, lengths)
    jax.block_until_ready(fewer)
    jax.effects_barrier()
    assert calls == [4, 4, 4, 4]
    assert rollout.num_compilations == 1


@pytest.mark.slow
def test_decoding_stops_when_all_have_ended(group):
    answerer, frames, index, ids, lengths = group
    endless = Rollout.of(answerer, max_new_tokens=12)(answerer.params, frames, index, ids, lengths)
    assert endless.steps == 12
    tokens = np.asarray(endless.tokens)
    # The token that the first answer gives third, or a later answer's, shall now end an answer.
    ends = tuple(int(t) for t in np.unique(tokens[..., 2]))
    generation = dataclasses.replace(answerer.generation, eos_token_ids=ends)
    short = Rollout(answerer.graphdef, answerer.processor.normalize, generation, max_new_tokens=12)(
        answerer.params, frames, index, ids, lengths
    )
    expected = np.argmax(np.isin(tokens, ends), axis=-1) + 1
    assert expected.max() == 3
    np.testing.assert_array_equal(short.lengths, expected)
    assert short.steps == 3
    behind = np.arange(12) >= expected[..., None]
    np.testing.assert_array_equal(short.tokens, np.where(behind, generation.pad_token_id, tokens))


def scripted(scores):
    """A `decode` that gives row `position` of scores [N, V] to every prompt."""

    def decode(token, position, cache):
        return scores[position], cache

    return decode


def test_repetition_penalty_by_hand():
    # Token 0 is best four times; a penalty of 2 halves a positive score and doubles a negative one, once generated.
    scores = jnp.array([[4.0, 1.0, -9.0], [4.0, 2.5, -9.0], [4.0, 2.5, -9.0], [-1.0, -2.0, -1.9]])
    generation = Generation((-1,), 7, 2.0)
    tokens, lengths, steps, _ = greedy_decode(scripted(scores), scores[:1], None, jnp.array([1]), generation, 4)
    # [4,1,-9] -> 0; [2,2.5,-9] -> 1; [2,1.25,-9] -> 0; [-2,-4,-1.9] -> 2
    assert tokens.tolist() == [[0, 1, 0, 2]]
    assert lengths.tolist() == [4] and steps == 4
    plain = dataclasses.replace(generation, repetition_penalty=1.0)
    assert greedy_decode(scripted(scores), scores[:1], None, jnp.array([1]), plain, 4)[0].tolist() == [[0, 0, 0, 0]]


def test_options_are_scored_where_the_answer_names_one():
    """Answers 2 0 2 (the option is the second token), 0 2 1 (the first), and 2 2 3 (none, so the first counts)."""
    p = np.array([[1, 1, 8, 0.1], [3, 2, 1, 0.1], [1, 1, 3, 2], [6, 1, 1, 1], [1, 3, 4, 1], [1, 2, 1, 8]], np.float32)
    scores = jnp.log(jnp.asarray(p))
    # The row of scores that answers step s of each prompt.
    script = np.array([[0, 1, 2], [3, 4, 5], [0, 4, 5]])
    places = jnp.array([0, 10, 20])

    def decode(token, place, cache):
        rows = jnp.asarray(script)[jnp.arange(3), place - places + 1]
        return scores[rows], cache

    options = jnp.array([[0, 1], [0, 1], [0, -1]])
    generation = Generation((3,), 9, 1.0)
    tokens, _, _, found = greedy_decode(decode, scores[script[:, 0]], None, places, generation, 3, None, options)
    assert tokens.tolist() == [[2, 0, 2], [0, 2, 3], [2, 2, 3]]
    np.testing.assert_allclose(np.exp(found), [[3 / 5, 2 / 5], [6 / 7, 1 / 7], [1, 0]], rtol=1e-5)


def test_options_of_a_group(group):
    """Named by the token that the first answer has second: that of the prompt continued by its first token."""
    answerer, frames, index, ids, lengths = group
    rollout = Rollout.of(answerer, max_new_tokens=2, return_first_logits=True)
    plain = rollout(answerer.params, frames, index, ids, lengths)
    first, second = np.asarray(plain.tokens)[0, 0]
    assert first != second
    options = np.array([[second, 9], [second, -1]])
    answers = rollout(answerer.params, frames, index, ids, lengths, options)
    np.testing.assert_array_equal(answers.tokens, plain.tokens)
    longer = ids.copy()
    longer[np.arange(2), lengths] = first
    logits = rollout(answerer.params, frames, index, longer, lengths + 1).first_logits[0, 0]
    np.testing.assert_allclose(
        answers.option_log_probs[0, 0], jax.nn.log_softmax(logits[np.array([second, 9])]), atol=1e-4
    )
    np.testing.assert_allclose(answers.option_log_probs[1], [[0, -np.inf]] * 3, atol=1e-6)


def test_end_tokens_are_several_and_end_each_prompt_alone():
    scores = jnp.stack([jnp.eye(6)[token] for token in (1, 2, 3, 4, 5)])
    generation = Generation((3, 1), 0, 1.0)
    first = scores[jnp.array([0, 1, 3])]
    tokens, lengths, steps, _ = greedy_decode(scripted(scores), first, None, jnp.array([1, 2, 4]), generation, 2)
    assert tokens.tolist() == [[1, 0], [2, 3], [4, 5]]
    assert lengths.tolist() == [1, 2, 2] and steps == 2


def test_greedy_answers_of_hugging_face(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from tspo_jax.checkpoints import weights
    from tspo_jax.models.layers import abstract_module, merge_params
    from tspo_jax.models.qwen2 import Qwen2, Qwen2Config

    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.5,
    )
    reference = transformers.Qwen2ForCausalLM(config).eval()
    reference.save_pretrained(tmp_path)
    cfg = Qwen2Config.from_hf(config.to_dict())
    graphdef, abstract = abstract_module(lambda rngs: Qwen2(cfg, rngs=rngs))
    naming = weights.Format(((r"^lm_head\.", "lm_head."), (r"^", "model.")))
    params = weights.load_params(tmp_path, abstract, naming)

    # Right-padded prompts of 5 and 9 embeddings; only generated tokens count for the penalty, as in the original.
    rng = np.random.default_rng(0)
    embeddings, lengths = rng.normal(size=(2, 9, 32)).astype(np.float32), np.array([5, 9])
    generation = Generation((3,), 0, 1.3)

    @jax.jit
    def answers(params, embeddings, lengths):
        model = merge_params(graphdef, params)
        positions = jnp.broadcast_to(jnp.arange(9), (2, 9))
        hidden, cache = model(embeddings, positions)

        def decode(token, position, cache):
            hidden, cache = model(model.embed_tokens(token[:, None]), position[:, None], cache)
            return model.logits(hidden[:, 0]), cache

        last = model.logits(hidden[jnp.arange(2), lengths - 1])
        return greedy_decode(decode, last, cache.extend(24), lengths, generation, 24)[:3]

    tokens, answer_lengths, _ = answers(params, embeddings, lengths)
    for b, length in enumerate(lengths):
        inputs = torch.tensor(embeddings[b : b + 1, :length])
        options = dict(do_sample=False, max_new_tokens=24, repetition_penalty=1.3, eos_token_id=3, pad_token_id=0)
        theirs = reference.generate(inputs_embeds=inputs, **options)[0].tolist()
        unpenalised = reference.generate(inputs_embeds=inputs, **options | {"repetition_penalty": 1.0})[0].tolist()
        assert tokens[b, : answer_lengths[b]].tolist() == theirs
        assert theirs != unpenalised  # so that the penalty is what is compared


def test_unique_frames_of_a_group():
    picks = np.array([[[1, 5], [5, 9]], [[0, 2], [0, 2]]])
    frames, index = unique_frames(picks)
    assert frames.tolist() == [[1, 5, 9, 9], [0, 2, 2, 2]]
    np.testing.assert_array_equal(np.take_along_axis(frames, index.reshape(2, 4), axis=1).reshape(2, 2, 2), picks)
    assert unique_frames(picks, num_slots=3)[0].tolist() == [[1, 5, 9], [0, 2, 2]]
    with pytest.raises(ValueError, match="3 unique frames, more than 2 slots"):
        unique_frames(picks, num_slots=2)


def test_impossible_limits_are_named(answerers):
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        Rollout.of(answerers["llava_video_grid"], max_new_tokens=0)


def test_prefill_chunk_must_divide_the_group(group):
    answerer, *arrays = group
    with pytest.raises(ValueError, match="prefill_chunk is 2; it must divide the group size 3"):
        Rollout.of(answerer, max_new_tokens=1, prefill_chunk=2)(answerer.params, *arrays)


def test_a_decoded_token_reads_weights_and_cache_once():
    """Bytes that the compiler counts for one more token, of a model whose weights and cache are most of them."""
    layers, width, tokens = 3, 256, 600
    description = {
        "model_type": "llava_qwen",
        "hidden_size": width,
        "intermediate_size": 1024,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 256,
        "vision_config": dict(
            hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28
        ),
    }
    answerer = answerer_architecture(description, "the test")
    rollout = Rollout(answerer.graphdef, answerer.processor.normalize, Generation((0,), 0, 1.0), max_new_tokens=8)
    B, G, K = 1, 4, 1
    program = rollout.program.trace(
        answerer.abstract,
        jax.ShapeDtypeStruct((B, G, 28, 28, 3), jnp.uint8),
        *(jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((B, G, K), (B, tokens), (B,))),
    )
    text = program.lower().compile().as_text()
    one, two = (Program(text, arithmetic(program.jaxpr, {"decode": n}).trips, 1).hbm_bytes for n in (1, 2))
    language = answerer.abstract["language_model"]
    weights = 4 * sum(x.size for x in jax.tree.leaves((language["layers"], language["lm_head"])))
    slots = tokens - 1 + answerer.config.num_visual_tokens(K) + rollout.max_new_tokens
    cache = 4 * layers * 2 * G * slots * (width // 2)
    assert weights + cache < two - one < 1.2 * (weights + cache)
