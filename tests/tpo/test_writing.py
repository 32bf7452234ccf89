"""Pairs by a writer: replies in any form, what is kept, resuming."""

import json

import pytest
from tiny_store import store_lengths

from tspo_jax import config as cfg
from tspo_jax.answering.writers import FunctionWriter
from tspo_jax.tpo import config as tpo_config
from tspo_jax.tpo import writing
from tspo_jax.tpo.config import TpoConfig


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return store_lengths(tmp_path_factory.mktemp("store"), {"a.mp4": 20, "b.mp4": 20})


def config_of(output):
    config = tpo_config.default()
    config.build.update(output=str(output), writer="m:f", frames=4, sparse_frames=1)
    return cfg.read(config, TpoConfig)


class World:
    """An answerer whose answer is the frames that it saw, and a writer that agrees; both count what they are asked."""

    def __init__(self, judge=("Yes", "no.", "YES"), question="Q: What is it?\nA: A cat."):
        self.answers, self.calls, self.judge, self.question = 0, 0, judge, question
        self.writer = FunctionWriter(self.write, "scripted")

    def answer(self, requests):
        for request in requests:
            self.answers += 1
            yield [(request, [" ".join(map(str, request.picks[0]))])]

    def write(self, prompts):
        self.calls += len(prompts)
        return [self.reply(prompt) for prompt in prompts]

    def reply(self, prompt):
        if "Write one question" in prompt:
            return self.question
        return self.judge[0 if "Equally" in prompt else 1 if "contradict" in prompt else 2]


def test_pairs_of_both_recipes(store, tmp_path):
    world = World()
    pairs, counts, shares = writing.build(config_of(tmp_path), store, store.names(), world.answer, world.writer)
    assert {(pair["video"], pair["recipe"]) for pair in pairs} == {
        (video, recipe) for video in ("a.mp4", "b.mp4") for recipe in ("irrelevant", "incomplete")
    }
    for pair in pairs:
        chosen, rejected = ({frame for _, frame in pair["picks"][name]} for name in ("chosen", "rejected"))
        assert pair["prompt"] == "<image>\nWhat is it?" and pair["judge"]["better"] == "yes"
        if pair["recipe"] == "irrelevant":
            assert not chosen & rejected and max(chosen) - min(chosen) < 5, "a part of the video"
        else:
            assert rejected < chosen and len(rejected) == 1
    assert counts["asked"] == counts["judged_correct"] == 4 and shares == {"irrelevant": 1.0, "incomplete": 1.0}
    json.dumps(pairs)


def test_another_model_describes_the_videos(store, tmp_path):
    """The writer reads its captions; the answerer is asked only for answers."""
    world, described, prompts = World(), [], []

    def caption(requests):
        described.extend(requests)
        return ([(request, [f"Parts of {request.video}."])] for request in requests)

    def write(asked):
        prompts.extend(asked)
        return world.write(asked)

    writer = FunctionWriter(write, "scripted")
    pairs, _, _ = writing.build(config_of(tmp_path), store, store.names(), world.answer, writer, caption)
    assert len(pairs) == 4 and described and world.answers == 8
    assert all("Parts of " in prompt for prompt in prompts if "Write one question" in prompt)


@pytest.mark.parametrize(
    "judge", [("Equally", "no", "yes"), ("yes", "Yes", "yes"), ("yes", "no", "no"), ("Well", "no", "yes")]
)
def test_one_call_against_it_drops_a_pair(store, tmp_path, judge):
    world = World(judge)
    pairs, counts, _ = writing.build(config_of(tmp_path), store, store.names(), world.answer, world.writer)
    assert not pairs and counts["judged_unreadable"] == 4 * (judge[0] == "Well")


def test_videos_without_a_question(store, tmp_path):
    world = World(question="None")
    pairs, counts, shares = writing.build(config_of(tmp_path), store, store.names(), world.answer, world.writer)
    assert not pairs and counts["questions"] == 0 and shares["irrelevant"] == 0


def test_nothing_is_asked_twice(store, tmp_path):
    first, again = World(), World()
    whole = writing.build(config_of(tmp_path), store, store.names(), first.answer, first.writer)
    assert writing.build(config_of(tmp_path), store, store.names(), again.answer, again.writer) == whole
    assert (again.answers, again.calls) == (0, 0) and first.calls == 4 * 4


@pytest.mark.parametrize(
    "reply, found",
    [
        ("Q: Why?\nA: Because.", ("Why?", "Because.")),
        ("Sure.\nQ:  Why\n so?\nA: Because\nit is.", ("Why\n so?", "Because\nit is.")),
        ("None", None),
        ("A: x\nQ: y", None),
        (None, None),
    ],
)
def test_questions_in_replies(reply, found):
    assert writing.read_question(reply) == found


def test_first_words():
    assert writing.first_word(" **Yes**, it is", ("yes", "no")) == "yes"
    assert writing.first_word("Perhaps yes", ("yes", "no")) is None
    assert writing.first_word("", ("yes",)) is None and writing.first_word(None, ("yes",)) is None
