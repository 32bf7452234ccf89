"""What the steps of a run of TSPO need, before the first one: memory, and time where the chip is known."""

from collections.abc import Callable, Iterable

import jax
import numpy as np

from tspo_jax.config import Config
from tspo_jax.data.loader import Batch
from tspo_jax.devices import sharding
from tspo_jax.devices.compiling import Call
from tspo_jax.runs.estimate import Estimate, Steps
from tspo_jax.tspo.actor import ARRAYS, RESAMPLED_DRAWS, RESAMPLED_GROUPS
from tspo_jax.tspo.environment import Environment, num_chunks, reward_weights
from tspo_jax.tspo.programs import TrainState


def shape_of(rows: Batch) -> tuple[str, int]:
    """Kind of sample and T: batches that agree in them run the same programs."""
    return rows["kind"], rows["mask"].shape[1]


def of_run(
    config: Config,
    mesh: jax.sharding.Mesh,
    environment: Environment,
    examples: Iterable[tuple[float, Batch]],
    sample: Callable,
    update: Callable,
    state: TrainState,
    initial: dict | None,
) -> list[Steps]:
    """Compiles the programs of all steps; calls of the same shapes then find them.

    Args:
      examples: Loader.examples().
      sample, update, state, initial: the programs, and what `update` is called with.
    """
    G, a = config.policy.group_size, config.answerer

    def calls(rows: Batch, k: int, length: int) -> dict[str, Call]:
        B, step = len(rows["index"]), np.int32(0)
        batch = sharding.abstract_batch(mesh, {name: rows[name] for name in ARRAYS})
        draws = sharding.abstract_batch(mesh, np.empty((B, G, k), np.int32))
        names = ("total", "unparsed", *reward_weights(config)[rows["kind"]])
        of_groups = ("unique_frames", "cosine_spread")
        if config.policy.dead_groups == "resample":
            names, of_groups = names + RESAMPLED_DRAWS, of_groups + RESAMPLED_GROUPS
        measured = {name: np.empty((B, G), np.float32) for name in names}
        measured |= {name: np.empty(B, np.float32) for name in of_groups}
        measured = sharding.abstract_batch(mesh, measured)
        rollout, shown = environment.abstract_call(rows, k, length)
        trips = {"encode": -(-G * k // a.encode_chunk), "decode": a.max_new_tokens - 1}
        return {
            "sample": Call(sample, (state.agent, batch, step), {"k": k, "attempt": step}, {}),
            "answer": Call(rollout, shown, {}, trips, num_chunks(config, mesh)),
            "update": Call(update, (state, batch, draws, measured, step, initial), {}, {}),
        }

    steps = []
    for share, rows in examples:
        kind, T = shape = shape_of(rows)
        choices = config.policy.random_k or (rows["k"],)
        for k in choices:
            of_k = environment.prompt_lengths(kind, k)
            for length, of_length in zip(of_k.rungs, of_k.shares, strict=True):
                words = f"{kind} samples, {T} candidates, K = {k}"
                words += f", prompts of {length} tokens of text" if len(of_k.rungs) > 1 else ""
                part = share / len(choices) * float(of_length)
                steps.append(Steps(shape, words, part, Estimate(calls(rows, k, length), mesh)))
    return steps
