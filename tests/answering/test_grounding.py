import numpy as np
import pytest

from tspo_jax.answering import grounding
from tspo_jax.checkpoints.folders import load_answerer


@pytest.fixture(scope="module")
def frames():
    return list(np.random.default_rng(0).integers(0, 256, (8, 30, 40, 3), np.uint8))


def test_an_answer_that_cannot_be_read_is_asked_for_once_more(golden, frames, monkeypatch):
    """A model of random weights says nothing that has two lines of names."""
    monkeypatch.setattr(grounding.grounding, "MAX_NEW_TOKENS", 8)
    asked = []
    say = grounding.answer

    def listen(answerer, rollout, frames, prompt):
        asked.append(prompt)
        return say(answerer, rollout, frames, prompt)

    monkeypatch.setattr(grounding, "answer", listen)
    ground = grounding.grounder(load_answerer(golden / "llava_video_grid"))
    with pytest.raises(ValueError, match=r"named no objects to search for, asked twice \(the answer"):
        ground(frames, "Who opens the door?\nA. The cat\nB. A dog")
    assert len(asked) == 2 and asked[1] != asked[0]
    assert all("Question: Who opens the door?\nOptions: The cat; A dog\n" in prompt for prompt in asked)


@pytest.mark.parametrize("readable", [1, 2])
def test_names(golden, frames, monkeypatch, readable):
    """The first reply that can be read counts."""
    replies = iter([{"answer": "I see."}, {"answer": "door, cat\nhouse"}][2 - readable :])
    monkeypatch.setattr(grounding, "answer", lambda *_: next(replies))
    ground = grounding.grounder(load_answerer(golden / "llava_video_grid"))
    assert ground(frames, "Who opens the door?") == (("door", "cat"), ("house",))
