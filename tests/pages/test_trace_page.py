"""The trace page parses, and shows what was looked at and why."""

import dataclasses
import json
from xml.etree import ElementTree

import pytest

from tspo_jax.answering.agent_prompts import Asked
from tspo_jax.answering.backtracking import Settings, VideoFacts, backtrack, run
from tspo_jax.answering.calls import Calls, Reply
from tspo_jax.pages import trace_page
from tspo_jax.toy.caption_world import Replies, World, by_keywords

KEY = Asked("key", "<harbour>.mp4", "What is dropped in the harbour?", ("a blue hat", "a red key"))


@pytest.fixture(scope="module")
def outcome():
    world, writer = World([(0, 600, 1e9, "a <b>harbour</section>"), (134, 139, 10, "a red key")]), Replies(by_keywords)
    steps = backtrack(KEY, VideoFacts(KEY.video, 300.0), Settings(rounds=3), writer)
    (one,) = run([steps], Calls(None, world, writer))
    return json.loads(json.dumps(dataclasses.asdict(one)))


def test_page(outcome):
    page = trace_page.page([outcome], "Trace <1>")
    root = ElementTree.fromstring(page.partition("\n")[2])
    text = " ".join(root.itertext())
    for part in ("Trace <1>", KEY.text, "a red key", "Look closely.", "phase", "a <b>harbour</section>", "Why: words"):
        assert part in text
    bars = [one for one in root.iter() if one.tag.endswith("rect")]
    assert len(bars) == outcome["captions"]
    assert {bar.get("class") for bar in bars} == {"coarse", "fine"}
    assert all(0 <= float(bar.get("x")) <= 1000 for bar in bars)


def test_page_of_a_question_that_failed(outcome):
    writer = Replies(lambda prompt: Reply(None, "the server is down"))
    steps = backtrack(KEY, VideoFacts(KEY.video, 61.5), Settings(rounds=1), writer)
    (one,) = run([steps], Calls(None, World([]), writer))
    page = trace_page.page([outcome, dataclasses.asdict(one)])
    text = " ".join(ElementTree.fromstring(page.partition("\n")[2]).itertext())
    assert "no answer" in text and "failed: the server is down" in text and "no reply" in text
