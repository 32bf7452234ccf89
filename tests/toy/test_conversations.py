import itertools
import re

import numpy as np
import pytest
from toy_bank import full_bank, reader

from tspo_jax.answering import prompts
from tspo_jax.models.video_prompt import VIDEO_TOKEN
from tspo_jax.toy import conversations as toy
from tspo_jax.toy.conversations import ConversationWriter, Turn, draw_batch, draw_times, render_conversation
from tspo_jax.toy.frame_bank import THING_NAMES
from tspo_jax.toy.questions import questions_for
from tspo_jax.toy.scenes import World, make_video_plan
from tspo_jax.toy.settings import SETTINGS

BANK = full_bank(size=24)
PLACES = {place.capitalize(): name for name, place in SETTINGS.items()}


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
    if question == toy.LIST_QUESTION:
        return {", ".join(" ".join(filter(None, words[1:])) or "nothing" for words in contents)}
    if question == toy.BALLS_QUESTION:
        relation, pairs = "with", [(thing, ball) for _, thing, ball in runs if thing and ball]
    else:
        assert question == toy.ORDER_QUESTION
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
            if question in (toy.BALLS_QUESTION, toy.ORDER_QUESTION):
                answer = ", ".join(sorted(answer.split(", ")))  # told in any order
            if question == toy.LETTER_QUESTION:  # of the options alone
                word, letter = answer.split()
                assert options_of(turn)[letter] == word
                continue
            assert right_answers(question, contents) == {answer}, (question, contents)
    exercises = toy.LIST_QUESTION, toy.BALLS_QUESTION, toy.ORDER_QUESTION, toy.LETTER_QUESTION
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
        assert set(suffixes) <= {toy.WORD_SUFFIX, prompts.LETTER_SUFFIX}
        assert low <= np.mean([suffix == toy.WORD_SUFFIX for suffix in suffixes]) <= high


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
        Turn("And this?", toy.WORD_SUFFIX, " red"),
        Turn(toy.LIST_QUESTION, "", " tree red, nothing"),
    ]
    texts = render_conversation(turns)
    assert texts[1::2] == ["B<|im_end|>", " red<|im_end|>", " tree red, nothing<|im_end|>"]
    assert texts[0] == prompts.render(turns[0].question, "qwen_1_5")
    assert "".join(texts) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n<image>\nWhat is it?\nA. x\nB. y\n{prompts.LETTER_SUFFIX}<|im_end|>\n"
        "<|im_start|>assistant\nB<|im_end|>\n"
        f"<|im_start|>user\nAnd this?\n{toy.WORD_SUFFIX}<|im_end|>\n"
        "<|im_start|>assistant\n red<|im_end|>\n"
        f"<|im_start|>user\n{toy.LIST_QUESTION}<|im_end|>\n"
        "<|im_start|>assistant\n tree red, nothing<|im_end|>"
    )


@pytest.mark.parametrize(
    ("name", "num_frames"), [("llava_video", 4), ("llava_video", 8), ("llava_video", 16), ("qwen3_vl", 8)]
)
def test_batches_are_conversations_as_the_rollout_would_see_them(name, num_frames):
    answerer = reader(name)
    tokenizer, writer = answerer.tokenizer, ConversationWriter(BANK)
    batch = draw_batch(np.random.default_rng(5), writer, answerer, num_frames=num_frames, batch_size=12)
    rng, times, B, N = np.random.default_rng(5), np.random.default_rng(5), *batch.ids.shape
    assert batch.frames.shape == (12, num_frames) and batch.weights.shape == (12, N) and B == 12 and N % 64 == 0
    assert batch.ids.dtype == np.int32 and batch.weights.dtype == np.float32
    for frames, ids, length, weights in zip(*batch, strict=True):
        conversation = writer(rng, num_frames, 3)
        assert frames.tolist() == conversation.frames
        texts = render_conversation(conversation.turns, answerer.template)
        texts[0] = answerer.config.write_times(texts[0], draw_times(times.spawn(1)[0], num_frames))
        expected = prompts.tokenize("".join(texts), tokenizer)
        assert length == len(expected)
        assert ids[:length].tolist() == expected and np.all(ids[length:] == tokenizer.pad_token_id)
        assert np.sum(ids == VIDEO_TOKEN) == (num_frames if name == "qwen3_vl" else 1)
        counted = np.flatnonzero(weights)
        spans = np.split(counted, np.flatnonzero(np.diff(counted) > 1) + 1)
        assert [tokenizer.decode(ids[span]) for span in spans] == texts[1::2]
        for span in spans:
            np.testing.assert_allclose(weights[span], 1 / len(span), rtol=1e-6)


def test_times_are_those_of_candidates_one_a_second():
    rng = np.random.default_rng(0)
    spacings = []
    for _ in range(200):
        seconds = draw_times(rng, 16).seconds
        assert seconds.shape == (16,) and seconds[0] >= 0 and seconds[-1] < 832 * 1.05
        assert np.diff(seconds).min() >= 0.95
        spacings.append(seconds[-1] / 16)
    assert np.ptp(spacings) > 20  # of short and of long videos


def test_a_family_sees_the_same_frames_whether_or_not_it_is_told_their_times():
    batches = [
        draw_batch(
            np.random.default_rng(3),
            ConversationWriter(BANK),
            reader(name),
            num_frames=4,
            batch_size=5,
        )
        for name in ("llava_video", "qwen3_vl")
    ]
    np.testing.assert_array_equal(batches[0].frames, batches[1].frames)
