"""Backtracking finds what the coarse captions miss, and flat does not."""

import numpy as np

from tspo_jax.answering.backtracking import STRATEGIES, Settings, run
from tspo_jax.answering.calls import Calls, CaptionCall
from tspo_jax.toy.caption_world import Replies, World, by_keywords, missed_event

NUM = 40


def accuracy(strategy: str) -> float:
    right = []
    for seed in range(NUM):
        asked, facts, world = missed_event(seed)
        writer = Replies(by_keywords)
        settings = Settings(captions=30, writer_calls=8)
        (one,) = run([STRATEGIES[strategy](asked, facts, settings, writer)], Calls(None, world, writer))
        dropped = world.events[-1][3].removeprefix("someone drops ")
        right.append(one.option == "ABCD"[asked.options.index(dropped)])
        assert one.captions == world.made <= 30 and one.writer_calls == len(writer.prompts) <= 8
    return float(np.mean(right))


def test_a_five_second_event():
    assert accuracy("backtrack") >= 0.8
    assert abs(accuracy("flat") - 0.25) < 3 * (0.25 * 0.75 / NUM) ** 0.5


def test_the_captioner_notices_in_short_clips_only():
    world = World([(0, 100, 1e9, "a harbour"), (34, 39, 10, "a key")])
    assert world.caption(CaptionCall("v", tuple(range(60)), 1, "")) == "0.0 to 60.0: a harbour"
    assert "a key" in world.caption(CaptionCall("v", tuple(30 + k / 2 for k in range(20)), 1, ""))
    assert "a key" not in world.caption(CaptionCall("v", tuple(20 + k / 2 for k in range(20)), 1, ""))
