"""Drawing dead groups again, and K of a step; the rest runs in test_train.py."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tspo_jax.config import Config
from tspo_jax.devices import sharding
from tspo_jax.runs.metrics import Stopwatch
from tspo_jax.tspo.actor import Actor, Loaded


class FakeEnvironment:
    """Rewards of each attempt, given in advance; remembers what it was asked."""

    def __init__(self, rewards):
        self.rewards, self.asked = iter(rewards), 0

    def show(self, rows, picks, watch):
        return [picks]

    def ask(self, shown, watch):
        self.asked += 1
        return list(shown)

    def measure(self, rows, picks, answers, watch):
        np.testing.assert_array_equal(answers[0], picks)
        return {"total": np.array(next(self.rewards), np.float32), "unique_frames": picks[:, 0, 0].astype(np.float32)}


def make_actor(rewards, **policy):
    config = dataclasses.replace(Config(), policy=dataclasses.replace(Config().policy, **policy))
    mesh = sharding.make_mesh([("data", 2), ("model", 1)], jax.devices()[:2])

    def sample(agent, batch, step, k, attempt):
        """Draws that say by which agent, at which step and attempt they were made."""
        return sharding.put_batch(mesh, np.full((2, 2, k), 100 * agent + 10 * int(step) + int(attempt), np.int32))

    environment = FakeEnvironment(rewards)
    clock = SimpleNamespace(started=lambda result, since: None)
    return Actor(config, mesh, sample, environment, clock), environment


def measured(actor, environment, watch):
    loaded = Loaded({"k": 3}, {})
    drawn = actor.draw(4, 1, loaded, watch)
    draws, found = actor.measure(4, 1, drawn, environment.ask(drawn.shown, watch), watch)
    return np.asarray(draws)[:, 0, 0].tolist(), jax.tree.map(lambda x: np.asarray(x).tolist(), found)


LIVE, DEAD = [0.0, 1.0], [1.0, 1.0]


@pytest.mark.parametrize(
    ("rewards", "draws", "optimised"),
    [
        ([[LIVE, LIVE]], [140, 140], [LIVE, LIVE]),
        ([[DEAD, LIVE], [LIVE, DEAD]], [141, 140], [LIVE, LIVE]),
        ([[DEAD, DEAD], [DEAD, LIVE], [LIVE, DEAD]], [142, 141], [LIVE, LIVE]),
        ([[DEAD, LIVE], [DEAD, DEAD], [DEAD, LIVE]], [142, 140], [DEAD, LIVE]),
    ],
)
def test_dead_groups_are_replaced_until_none_is_left(rewards, draws, optimised):
    """What is logged is what the policy drew at first; what is optimised, what was drawn instead."""
    actor, environment = make_actor(rewards, dead_groups="resample", resamples=2)
    found = measured(actor, environment, Stopwatch())
    dead, after = ([float(group == DEAD) for group in groups] for groups in (rewards[0], optimised))
    logged = {"total": rewards[0], "unique_frames": [140.0, 140.0], "dead_groups": dead}
    assert found == (draws, logged | {"optimised": optimised, "dead_after_resampling": after})
    assert environment.asked == len(rewards)


def test_dead_groups_stay_where_nothing_is_said():
    actor, environment = make_actor([[DEAD, LIVE]])
    assert measured(actor, environment, Stopwatch())[0] == [140, 140] and environment.asked == 1


def test_k_is_the_kinds_or_random_by_seed_and_step():
    actor, _ = make_actor([])
    assert actor.k(0, {"k": 5}) == 5
    actor, _ = make_actor([], random_k=(2, 4, 8))
    ks = [actor.k(step, {"k": 5}) for step in range(60)]
    assert ks == [actor.k(step, {"k": 1}) for step in range(60)] and set(ks) == {2, 4, 8}
    assert jnp.bincount(jnp.array(ks)).max() < 40
