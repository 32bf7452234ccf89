import json

import pytest

from tspo_jax.answering.calls import Calls, CaptionCall, ReplayError, Reply, WriterCall
from tspo_jax.toy.caption_world import Replies, World

CLIPS = [CaptionCall("v", (float(i), i + 0.5), 100, "look") for i in range(5)]
ASK = WriterCall("answer", "why?")


def test_calls_are_batched_shared_and_remembered(tmp_path):
    path = tmp_path / "calls.jsonl"
    world, writer = World([(0, 9, 9, "rain")]), Replies(lambda prompt: "because\ud800")
    calls = Calls(path, world, writer, batch_size=2)
    replies = calls([*CLIPS, ASK, CLIPS[0], ASK])
    assert replies[0] == replies[6] and replies[5].text == replies[7].text == "because?"
    assert (calls.made, world.made, len(writer.prompts)) == ({CaptionCall: 5, WriterCall: 1}, 5, 1)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["kind"] for row in rows] == ["caption"] * 5 + ["write"]
    assert rows[0]["video"] == "v" and rows[0]["times"] == [0.0, 0.5] and rows[5]["prompt"] == "why?"
    again = Calls(path, None, None, captioner_identity=World.identity, writer_identity="scripted")
    assert again([*CLIPS, ASK]) == replies[:6] and again.found[CaptionCall] == 5


def test_other_models_are_other_calls(tmp_path):
    path = tmp_path / "calls.jsonl"
    Calls(path, None, Replies(str))([ASK])
    other = Replies(str, identity="another")
    Calls(path, None, other)([ASK])
    assert len(other.prompts) == 1
    with pytest.raises(ReplayError, match="WriterCall"):
        Calls(path, None, None, writer_identity="a third")([ASK])


def test_keys_hold_all_that_a_caption_depends_on():
    calls = Calls(None, None, None)
    variants = [CLIPS[0], CLIPS[1]]
    variants += [CaptionCall("w", (0.0, 0.5), 100, "look"), CaptionCall("v", (0.0, 0.5), 101, "look")]
    variants += [CaptionCall("v", (0.0, 0.5), 100, "see"), CaptionCall("v", (0.0,), 100, "look")]
    variants += [CaptionCall("v", (0.0, 0.5), 100, "look", "another file of this name")]
    assert len({calls.key(call) for call in variants}) == len(variants)


def test_errors_are_not_remembered(tmp_path):
    path = tmp_path / "calls.jsonl"
    (reply,) = Calls(path, None, Replies(lambda prompt: Reply(None, "down")))([ASK])
    assert reply.error == "down"
    (reply,) = Calls(path, None, Replies(lambda prompt: "up"))([ASK])
    assert reply.text == "up"
    assert [json.loads(line)["error"] for line in path.read_text().splitlines()] == ["down", None]


def test_a_file_of_something_else(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text('{"id": "q1", "question": "Why?"}\n')
    with pytest.raises(ValueError, match="questions.jsonl: is no file of calls: its row q1 has no 'kind'"):
        Calls(path, None, Replies(str))


def test_wrong_numbers():
    with pytest.raises(ValueError, match="batch_size is 0"):
        Calls(None, None, None, batch_size=0)
    writer = Replies(str)
    writer.write = lambda prompts: []
    with pytest.raises(ValueError, match="0 replies"):
        Calls(None, None, writer)([ASK])
