"""Answers in rounds about the scripted world of toy/caption_world.py, for the tests of pages that show them."""

from tspo_jax.answering.backtracking import STRATEGIES, Settings, run
from tspo_jax.answering.calls import Calls
from tspo_jax.answering.strategies import facts
from tspo_jax.toy.caption_world import Replies, World

QUESTION = "What is dropped <b>?\nA. a red key\nB. a blue hat"


def in_rounds_by(reply):
    """What a Library takes as `in_rounds`; `reply` is the writer's."""
    world = World([(0, 5, 1e9, "a yard"), (1, 2, 1.5, "a red key")])

    def in_rounds(strategy, store, asked, watch):
        writer = Replies(reply)
        steps = STRATEGIES[strategy](asked, facts(store, asked.video), Settings(rounds=2), writer, watch)
        (outcome,) = run([steps], Calls(None, world, writer))
        return outcome

    return in_rounds
