"""The part of a step before the update: frames are drawn, and their answers are measured."""

import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from tspo_jax.answering.rollout import Answers
from tspo_jax.config import Config
from tspo_jax.data.loader import Batch
from tspo_jax.devices import sharding
from tspo_jax.runs.metrics import DeviceClock, Stopwatch
from tspo_jax.tspo import policy
from tspo_jax.tspo.environment import Environment, Shown

ARRAYS = ("index", "copy", "features", "text", "mask")  # of a batch, that the programs need
# What is measured besides where dead groups are drawn again: per draw, the rewards that are optimised; per group,
# whether it was dead at first (so it was drawn again) and at last.
RESAMPLED_DRAWS, RESAMPLED_GROUPS = ("optimised",), ("dead_groups", "dead_after_resampling")


class Loaded(NamedTuple):
    """A batch: its rows on the host, and what the programs need of them."""

    rows: Batch
    batch: dict[str, jax.Array]


def put(mesh: jax.sharding.Mesh, rows: Batch) -> Loaded:
    return Loaded(rows, sharding.put_batch(mesh, {name: rows[name] for name in ARRAYS}))


class Drawn(NamedTuple):
    """A batch with draws int32 [B,G,K] (global), the same ascending on the host, and their frames, fetched or not."""

    loaded: Loaded
    draws: jax.Array
    picks: np.ndarray
    shown: Iterable[Shown]


class Actor:
    """Args: `sample` is programs.make_sample's."""

    def __init__(
        self,
        config: Config,
        mesh: jax.sharding.Mesh,
        sample: Callable,
        environment: Environment,
        clock: DeviceClock,
    ):
        self._config, self._mesh, self._sample = config, mesh, sample
        self._environment, self._clock = environment, clock

    def k(self, step: int, rows: Batch) -> int:
        """Frames of a draw at a step: the kind's, or, where it is random, a function of the seed and the step."""
        choices = self._config.policy.random_k
        return int(np.random.default_rng((self._config.seed, step)).choice(choices)) if choices else rows["k"]

    def draw(self, step: int, agent: dict, loaded: Loaded, watch: Stopwatch, attempt: int = 0) -> Drawn:
        with watch("sample"):
            k = self.k(step, loaded.rows)
            since = time.perf_counter()
            draws = self._sample(agent, loaded.batch, np.int32(step), k=k, attempt=np.int32(attempt))
            self._clock.started(draws, since)
            picks = np.sort(sharding.local_rows(draws), axis=-1)
        return Drawn(loaded, draws, picks, self._environment.show(loaded.rows, picks, watch))

    def measure(
        self, step: int, drew: dict, drawn: Drawn, answers: list[Answers], watch: Stopwatch
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Draws and what was measured of them (environment.measure), as global arrays.

        Where policy.dead_groups is resample, dead groups are drawn again by `drew`, and what is optimised are the draws
        and rewards (`optimised`) of that; all else that is measured describes what the policy drew at first.
        """
        environment, p = self._environment, self._config.policy
        draws, rows = drawn.draws, drawn.loaded.rows
        measured = environment.measure(rows, drawn.picks, answers, watch)
        if p.dead_groups == "resample":
            rewards = measured["total"]
            for attempt in range(1, 1 + p.resamples):
                is_dead = policy.dead(rewards)
                if not np.any(multihost_utils.process_allgather(is_dead.any())):
                    break
                again = self.draw(step, drew, drawn.loaded, watch, attempt)
                others = environment.measure(rows, again.picks, environment.ask(again.shown, watch), watch)
                rewards = np.where(is_dead[:, None], others["total"], rewards)
                draws = _where_on_device(sharding.put_batch(self._mesh, is_dead), again.draws, draws)
            was, is_still = (policy.dead(x).astype(np.float32) for x in (measured["total"], rewards))
            measured |= {"optimised": rewards, "dead_groups": was, "dead_after_resampling": is_still}
        return draws, sharding.put_batch(self._mesh, measured)


@jax.jit
def _where_on_device(rows: jax.Array, there: jax.Array, elsewhere: jax.Array) -> jax.Array:
    return jnp.where(rows[:, None, None], there, elsewhere)
