import dataclasses
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_bank import conversation_tokenizer, full_bank

from tspo_jax.answering import prompts
from tspo_jax.models.qwen2 import rope_angles, rotate
from tspo_jax.models.video_prompt import VIDEO_TOKEN
from tspo_jax.toy import answerer_training as training
from tspo_jax.toy.answerer_training import ConversationWriter, Turn, draw_batch, render_conversation, word_ids
from tspo_jax.toy.frame_bank import THING_NAMES
from tspo_jax.toy.questions import questions_for
from tspo_jax.toy.scenes import World, make_video_plan
from tspo_jax.toy.settings import SETTINGS

BANK = full_bank(size=24)
PLACES = {place.capitalize(): name for name, place in SETTINGS.items()}


@pytest.fixture(scope="module")
def tokenizer():
    return conversation_tokenizer()


@pytest.fixture(scope="module")
def tiny(tokenizer):
    """(graphdef, params) of a LLaVA-Video for frames of 24 px."""
    config = training.llava_config(len(tokenizer))
    config = dataclasses.replace(
        config,
        language=dataclasses.replace(config.language, hidden_size=64, intermediate_size=32, num_hidden_layers=3),
        vision=dataclasses.replace(
            config.vision, hidden_size=32, intermediate_size=32, num_hidden_layers=1, image_size=24
        ),
    )
    return training.initial_params(config, 0)


# ------------------------------------------------------------------------------------------------ conversations


def conversations(count, num_frames=8, **options):
    writer, rng = ConversationWriter(BANK), np.random.default_rng(0)
    for _ in range(count):
        conversation = writer(rng, num_frames, 3, **options)
        yield conversation, [BANK.words(i) for i in conversation.frames]


def said(turn):
    """The answer without what is looked for (of a question with options, the one whose letter is given)."""
    assert turn.answer[0] == " "
    if turn.suffix == "":
        return turn.answer[1:]
    *sought, answer = turn.answer.split()
    if turn.suffix == prompts.LETTER_SUFFIX:
        *sought, word = sought
        answer = options_of(turn)[answer]
        assert word == answer
    relation, *thing = sought
    question = turn.question.split("\n")[0]
    if relation not in ("with", "after", "beginning", "end"):
        assert question.startswith(f"{SETTINGS[relation].capitalize()}, what colour")
    else:
        assert f" {relation} " in question
    assert not thing or question.endswith(f" {thing[0]}?")
    return answer


def options_of(turn):
    options = dict(line.split(". ") for line in turn.question.split("\n")[1:])
    assert list(options) == list("ABCD") and len(set(options.values())) == 4
    return options


def right_answers(question, contents):
    """All answers that the frames' (setting, thing, ball), in order, allow."""
    runs = [run for run, _ in itertools.groupby(contents)]
    if match := re.fullmatch(r"(?:(.*), w|W)hat colour is the ball shown with the (\w+)\?", question):
        setting, thing = match[1] and PLACES[match[1]], match[2]
        return {b for s, t, b in contents if t == thing and b and setting in (None, s)}
    if match := re.fullmatch(r"What is shown at the (beginning|end) of the video\?", question):
        return {contents[0 if match[1] == "beginning" else -1][1]}
    if match := re.fullmatch(r"What is shown right after the (\w+)\?", question):
        return {runs[i + 1][1] for i, (_, thing, _) in enumerate(runs) if thing == match[1]}
    if question == training.LIST_QUESTION:
        return {", ".join(" ".join(filter(None, words[1:])) or "nothing" for words in contents)}
    if question == training.BALLS_QUESTION:
        relation, pairs = "with", [(thing, ball) for _, thing, ball in runs if thing and ball]
    else:
        assert question == training.ORDER_QUESTION
        relation = "after"
        pairs = [(a, b) for (_, a, _), (_, b, _) in itertools.pairwise(runs) if a and b and a != b]
    firsts = [first for first, _ in pairs]
    once = [" ".join((relation, *pair)) for pair in pairs if firsts.count(pair[0]) == 1]
    return {", ".join(sorted(once))}


@pytest.mark.parametrize("num_frames", [4, 8, 16])
def test_every_answer_is_right_and_the_only_one(num_frames):
    asked = set()
    for conversation, contents in conversations(400, num_frames):
        assert len(contents) == num_frames and 1 <= len(conversation.turns) <= 3
        questions = [turn.question.split("\n")[0] for turn in conversation.turns]
        assert len(set(questions)) == len(questions)
        for question, turn in zip(questions, conversation.turns, strict=True):
            asked.add(question)
            answer = said(turn)
            if question in (training.BALLS_QUESTION, training.ORDER_QUESTION):
                answer = ", ".join(sorted(answer.split(", ")))  # told in any order
            if question == training.LETTER_QUESTION:  # of the options alone
                word, letter = answer.split()
                assert options_of(turn)[letter] == word
                continue
            assert right_answers(question, contents) == {answer}, (question, contents)
    exercises = training.LIST_QUESTION, training.BALLS_QUESTION, training.ORDER_QUESTION, training.LETTER_QUESTION
    assert asked.issuperset(exercises)
    for start in (
        "What colour",
        *list(PLACES)[:3],
        "What is shown at the beg",
        "What is shown at the end",
        "What is shown r",
    ):
        assert any(question.startswith(start) for question in asked), start


def test_questions_are_worded_as_those_of_the_toy_world():
    rows = itertools.chain.from_iterable(
        questions_for(make_video_plan(seed, World()), "a.mp4", num_specific=4) for seed in range(60)
    )
    forms = {_form(row["problem"].removeprefix("<image>\n")) for row in rows}
    assert forms == {
        _form(turn.question.split("\n")[0])
        for conversation, _ in conversations(300, word_share=0)
        for turn in conversation.turns
        if turn.suffix
    }


def _form(question):
    for words in (THING_NAMES, PLACES):
        question = re.sub(rf"\b({'|'.join(words)})\b", "*", question)
    return question


def test_share_of_questions_for_a_word():
    for share, low, high in ((0, 0, 0), (1, 1, 1), (0.4, 0.35, 0.45)):
        turns = [turn for conversation, _ in conversations(300, word_share=share) for turn in conversation.turns]
        suffixes = [turn.suffix for turn in turns if turn.suffix]
        assert set(suffixes) <= {training.WORD_SUFFIX, prompts.LETTER_SUFFIX}
        assert low <= np.mean([suffix == training.WORD_SUFFIX for suffix in suffixes]) <= high


def test_answers_do_not_favour_a_letter_and_wrong_options_are_of_the_video():
    turns = [
        (turn, contents)
        for conversation, contents in conversations(400, word_share=0)
        for turn in conversation.turns
        if turn.suffix
    ]
    letters = np.array([turn.answer[-1] for turn, _ in turns])
    assert all(0.2 < np.mean(letters == letter) < 0.3 for letter in "ABCD")
    shares = []
    for turn, contents in turns:
        if "What is shown" in turn.question:
            shown = {thing for _, thing, _ in contents if thing}
            shares.append(len(shown & set(options_of(turn).values())) / min(4, len(shown)))
    assert np.mean(shares) > 0.5


def test_conversations_follow_the_template():
    turns = [
        Turn("What is it?\nA. x\nB. y", prompts.LETTER_SUFFIX, "B"),
        Turn("And this?", training.WORD_SUFFIX, " red"),
        Turn(training.LIST_QUESTION, "", " tree red, nothing"),
    ]
    texts = render_conversation(turns)
    assert texts[1::2] == ["B<|im_end|>", " red<|im_end|>", " tree red, nothing<|im_end|>"]
    assert texts[0] == prompts.render(turns[0].question, "qwen_1_5")
    assert "".join(texts) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n<image>\nWhat is it?\nA. x\nB. y\n{prompts.LETTER_SUFFIX}<|im_end|>\n"
        "<|im_start|>assistant\nB<|im_end|>\n"
        f"<|im_start|>user\nAnd this?\n{training.WORD_SUFFIX}<|im_end|>\n"
        "<|im_start|>assistant\n red<|im_end|>\n"
        f"<|im_start|>user\n{training.LIST_QUESTION}<|im_end|>\n"
        "<|im_start|>assistant\n tree red, nothing<|im_end|>"
    )


@pytest.mark.parametrize("num_frames", [4, 8, 16])
def test_batches_are_conversations_as_the_rollout_would_see_them(tokenizer, num_frames):
    writer = ConversationWriter(BANK)
    batch = draw_batch(np.random.default_rng(5), writer, tokenizer, num_frames=num_frames, batch_size=40)
    rng, B, N = np.random.default_rng(5), *batch.ids.shape
    assert batch.frames.shape == (40, num_frames) and batch.weights.shape == (40, N) and B == 40 and N % 32 == 0
    assert batch.ids.dtype == np.int32 and batch.weights.dtype == np.float32
    for frames, ids, weights in zip(*batch, strict=True):
        conversation = writer(rng, num_frames, 3)
        assert frames.tolist() == conversation.frames
        texts = render_conversation(conversation.turns)
        expected = prompts.tokenize("".join(texts), tokenizer)
        length = len(expected)
        assert ids[:length].tolist() == expected and np.all(ids[length:] == tokenizer.pad_token_id)
        assert np.sum(ids == VIDEO_TOKEN) == 1
        counted = np.flatnonzero(weights)
        spans = np.split(counted, np.flatnonzero(np.diff(counted) > 1) + 1)
        assert [tokenizer.decode(ids[span]) for span in spans] == texts[1::2]
        for span in spans:
            np.testing.assert_allclose(weights[span], 1 / len(span), rtol=1e-6)


def test_word_ids(tokenizer):
    ids = word_ids(tokenizer, ("tree", "red", "desert"))
    assert [tokenizer.decode(i) for i in ids] == [" tree", " red", " desert"]
    with pytest.raises(ValueError, match="splits zeppelin, quux: train it on more text"):
        word_ids(tokenizer, ("tree", "zeppelin", "quux"))


# ------------------------------------------------------------------------------------------------------ training


def attention_weights(cfg, language, layer, x):
    """Of states [N, D] at positions 0..N-1: [heads, N, N], causal."""
    p, (N, d) = {name: kernel for name, kernel in language["layers"]["self_attn"].items()}, (len(x), cfg.head_dim)
    x = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True))
    angles = rope_angles(jnp.arange(N)[None], d, cfg.rope_theta)
    q, k = (
        rotate((x @ p[name]["kernel"][layer] + p[name]["bias"][layer]).reshape(1, N, -1, d), angles)[0]
        for name in ("q_proj", "k_proj")
    )
    k = jnp.repeat(k, cfg.num_attention_heads // cfg.num_key_value_heads, axis=1)
    scores = jnp.einsum("nhd,mhd->hnm", q, k) / d**0.5
    return np.asarray(jax.nn.softmax(jnp.where(jnp.tril(jnp.ones((N, N), bool)), scores, -jnp.inf), axis=-1))


def test_attention_starts_out_finding_its_like_and_what_came_before(tokenizer):
    config = training.llava_config(len(tokenizer))
    graphdef, params = training.initial_params(config, 0)
    language, cfg = params["language_model"], config.language
    words = np.random.default_rng(0).normal(size=(12, cfg.hidden_size)).astype(np.float32)
    shown = np.arange(24) % 12  # every word twice
    for layer in range(cfg.num_hidden_layers):
        weights = attention_weights(cfg, language, layer, words[shown])
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
    np.testing.assert_array_equal(np.argmax(logits, axis=-1), np.arange(len(tokenizer)))


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def changed(before, after):
    return any(jax.tree.leaves(jax.tree.map(lambda a, b: bool(np.any(a != b)), before, after)))


def test_projection_leaves_the_language_models_layers_as_they_are(tiny, tokenizer, tmp_path):
    graphdef, params = tiny
    # Frames that are told apart by their brightness: what they show is easily learned.
    pixels = np.broadcast_to((BANK.setting * 20).astype(np.uint8)[:, None, None, None], BANK.pixels.shape)
    reports = []
    trained = training.train_projection(
        graphdef,
        params,
        BANK._replace(pixels=pixels),
        tokenizer,
        seed=0,
        num_steps=30,
        run_dir=tmp_path,
        report=lambda *report: reports.append(report),
    )
    steps, losses = zip(*reports, strict=True)
    assert steps == tuple(range(1, 31)) and losses[-1] < 0.8 * losses[0]
    assert jax.tree.structure(trained) == jax.tree.structure(params)
    language = trained["language_model"]
    for name in ("layers", "norm"):
        assert_same(language[name], params["language_model"][name])
    assert changed(params["language_model"]["embed_tokens"], language["embed_tokens"])
    words = language["embed_tokens"]["embedding"]
    np.testing.assert_allclose(language["lm_head"]["kernel"] * words.shape[1] ** 0.5, words.T, rtol=1e-5)
    for name in ("vision_tower", "mm_projector"):
        assert changed(params[name], trained[name])


def test_language_training_leaves_the_tower_as_it_is(tiny, tokenizer, tmp_path):
    graphdef, params = tiny
    reports = []
    trained = training.train_language(
        graphdef,
        params,
        BANK,
        tokenizer,
        seed=0,
        num_steps=4,
        batch_size=8,
        run_dir=tmp_path,
        report=lambda *report: reports.append(report),
    )
    steps, losses = zip(*reports, strict=True)
    assert steps == (1, 2, 3, 4) and np.all(np.isfinite(losses)) and losses[-1] < losses[0]
    assert jax.tree.structure(trained) == jax.tree.structure(params)
    assert_same(trained["vision_tower"], params["vision_tower"])
    for name in ("mm_projector", "image_newline", "language_model"):
        assert changed(params[name], trained[name]), name
