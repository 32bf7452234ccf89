"""Shares of work: what flags and environment say, and that the shares are a partition."""

from pathlib import Path

import pytest

from tspo_jax.job_array import Shard, shard_from


def test_flags_and_environment():
    assert shard_from(None, None, {}) == Shard(0, 1)
    assert shard_from(8, 3, {"JOB_COMPLETION_INDEX": "5"}) == Shard(3, 8)
    assert shard_from(8, None, {"JOB_COMPLETION_INDEX": "5"}) == Shard(5, 8)
    slurm = {"SLURM_ARRAY_TASK_ID": "4", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "1"}
    assert shard_from(None, None, slurm) == Shard(3, 4)
    for wrong in ((None, 3, {}), (4, None, {}), (4, 4, {}), (None, None, {"JOB_COMPLETION_INDEX": "1"})):
        with pytest.raises(ValueError, match="--shard_index"):
            shard_from(*wrong)


def test_shares():
    parts = [Shard(i, 3).of(range(7)) for i in range(3)]
    assert parts == [[0, 3, 6], [1, 4], [2, 5]]
    assert Shard().path(Path("s"), "lock") == Path("s/lock")
    assert Shard(1, 3).path(Path("s"), "bad", ".jsonl") == Path("s/bad-00001-of-00003.jsonl")
