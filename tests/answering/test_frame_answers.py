"""Batched requests get the answers that they get one by one."""

import dataclasses

import jax
import numpy as np
import pytest
from tiny_store import LONG, SHORT, make_store

from tspo_jax.answering import prompts
from tspo_jax.answering.frame_answers import Request, answer_requests
from tspo_jax.answering.given_frames import answer
from tspo_jax.answering.rollout import Rollout
from tspo_jax.answering.shapes import Shapes
from tspo_jax.checkpoints import weights
from tspo_jax.checkpoints.folders import load_answerer
from tspo_jax.data.frame_store import FrameStore
from tspo_jax.devices import sharding
from tspo_jax.devices.sharding import ShardingError


@pytest.fixture(scope="module")
def store(tmp_path_factory, golden):
    return FrameStore(make_store(tmp_path_factory.mktemp("frame_answers"), golden))


@pytest.mark.slow
def test_as_one_by_one(store, golden):
    """By a model split over two devices, with the batch dealt out to two such pairs."""
    folder = golden / "llava_video_grid"
    mesh = sharding.make_mesh((("data", 2), ("model", 2)), jax.devices()[:4])
    split = load_answerer(folder, sharding=sharding.answerer_sharding(mesh, weights.read_config(folder)))
    answerer = load_answerer(folder)
    sets = np.array([[0, 3], [3, 4]])
    requests = [
        Request("a", LONG, sets, "What is it?"),
        Request("b", SHORT, sets, "And what is that?"),
        Request("c", LONG, sets + 20, "Who?"),
        Request("other shape", LONG, sets[:1], "Who?"),
    ]
    rollout = Rollout.of(split, max_new_tokens=4, mesh=mesh)
    batches = list(answer_requests(requests, store, split, rollout, mesh, batch_size=2))
    assert [[request.id for request, _ in batch] for batch in batches] == [["a", "b"], ["c"], ["other shape"]]
    alone = Rollout.of(answerer, max_new_tokens=4)
    for request, texts in (pair for batch in batches for pair in batch):
        prompt = prompts.render(request.text, answerer.template, "")
        frames = [store.frames(request.video, picks) for picks in request.picks]
        assert texts == [answer(answerer, alone, shown, prompt)["answer"] for shown in frames]
    assert not list(answer_requests([], store, split, rollout, mesh, batch_size=2))
    # Longer padding and black frames; the same text from other frames.
    long = Shapes((4,), {4: (256,)})
    (((_, seen),),) = answer_requests(requests[:1], store, split, rollout, mesh, batch_size=2, of_all=long)
    assert seen == batches[0][0][1]
    black = dataclasses.replace(requests[0], blank=True)
    (((_, unseen),),) = answer_requests([black], store, split, rollout, mesh, batch_size=2, of_all=long)
    pixels = [np.zeros_like(frame) for frame in store.frames(LONG, [0, 3])]
    prompt = prompts.render(black.text, answerer.template, "")
    assert unseen == [answer(answerer, alone, pixels, prompt)["answer"]] * 2
    with pytest.raises(ShardingError, match="batch_size is 3"):
        list(answer_requests(requests, store, split, rollout, mesh, batch_size=3))
