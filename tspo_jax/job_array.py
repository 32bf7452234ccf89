"""Shares of work for the tasks of a SLURM array or a Kubernetes indexed job."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from absl import flags


@dataclasses.dataclass(frozen=True)
class Shard:
    """One of `count` runs that share the work."""

    index: int = 0
    count: int = 1

    def of(self, items: Sequence) -> list:
        return list(items[self.index :: self.count])

    def path(self, folder: Path, stem: str, suffix: str = "") -> Path:
        """FOLDER/STEM-I-of-N.SUFFIX, without numbers where there is one shard."""
        return folder / (stem + (f"-{self.index:05d}-of-{self.count:05d}" if self.count > 1 else "") + suffix)


def define_flags() -> None:
    flags.DEFINE_integer("num_shards", None, "Runs that share the work (SLURM_ARRAY_TASK_COUNT)", lower_bound=1)
    text = "This run, from 0 (SLURM_ARRAY_TASK_ID, JOB_COMPLETION_INDEX)"
    flags.DEFINE_integer("shard_index", None, text, lower_bound=0)


def shard_from(num_shards: int | None, shard_index: int | None, environment: Mapping[str, str] = os.environ) -> Shard:
    """The shard that flags or a job array's environment name; raises ValueError where only half is known."""
    if shard_index is None and "SLURM_ARRAY_TASK_ID" in environment:
        shard_index = int(environment["SLURM_ARRAY_TASK_ID"]) - int(environment.get("SLURM_ARRAY_TASK_MIN", 0))
        num_shards = num_shards or int(environment["SLURM_ARRAY_TASK_COUNT"])
    if shard_index is None and "JOB_COMPLETION_INDEX" in environment:
        shard_index = int(environment["JOB_COMPLETION_INDEX"])
    if (num_shards is None) != (shard_index is None):
        raise ValueError(f"--num_shards is {num_shards} and --shard_index {shard_index}: give both or none")
    if num_shards is not None and shard_index >= num_shards:
        raise ValueError(f"--shard_index={shard_index} must be below --num_shards={num_shards}")
    return Shard(shard_index or 0, num_shards or 1)
