"""Shares of work for the tasks of a SLURM array or a Kubernetes indexed job."""

import os
from collections.abc import Mapping

from absl import flags

from tspo_jax.data.shard import Shard


def define_flags() -> None:
    flags.DEFINE_integer("num_shards", None, "Runs that share the work (SLURM_ARRAY_TASK_COUNT)", lower_bound=1)
    text = "This run, from 0 (SLURM_ARRAY_TASK_ID, JOB_COMPLETION_INDEX)"
    flags.DEFINE_integer("shard_index", None, text, lower_bound=0)


def shard_from(num_shards: int | None, shard_index: int | None, environment: Mapping[str, str] = os.environ) -> Shard:
    """The shard that flags or a job array's environment name; raises ValueError where only half is known.

    The tasks of a SLURM array are counted from its first. With `num_shards` a task's own number is its index: an array
    of a few tasks does those again.
    """

    def number(name: str, default: int = 0) -> int:
        try:
            return int(environment.get(name, default))
        except ValueError:
            raise ValueError(f"{name} is {environment[name]!r}, not a number") from None

    source = "--shard_index"
    for name in ("SLURM_ARRAY_TASK_ID", "JOB_COMPLETION_INDEX"):
        if shard_index is None and name in environment:
            source, shard_index = name, number(name)
    if source == "SLURM_ARRAY_TASK_ID" and num_shards is None and "SLURM_ARRAY_TASK_COUNT" in environment:
        num_shards = number("SLURM_ARRAY_TASK_COUNT")
        shard_index = (shard_index - number("SLURM_ARRAY_TASK_MIN")) // number("SLURM_ARRAY_TASK_STEP", 1)
    if shard_index is None and num_shards is None:
        return Shard()
    if num_shards is None:
        raise ValueError(f"{source} is set, but not of how many: give --num_shards")
    if shard_index is None:
        raise ValueError(f"--num_shards is {num_shards}, but not which of them this run is: give --shard_index")
    if not 0 <= shard_index < num_shards:
        raise ValueError(f"{source} makes this shard {shard_index} of {num_shards}; they count from 0, without gaps")
    return Shard(shard_index, num_shards)
