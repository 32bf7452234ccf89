"""Shares of work: what flags and environment say, and that the shares are a partition."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from tspo_jax.command_line.job_array import Shard, shard_from


def slurm(task, count, **others):
    variables = {"ID": task, "COUNT": count} | others
    return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in variables.items()}


def test_flags_and_environment():
    assert shard_from(None, None, {}) == Shard(0, 1)
    assert shard_from(8, 3, {"JOB_COMPLETION_INDEX": "5"}) == Shard(3, 8)
    assert shard_from(8, None, {"JOB_COMPLETION_INDEX": "5"}) == Shard(5, 8)
    assert shard_from(None, None, slurm(4, 4, MIN=1, STEP=1)) == Shard(3, 4)
    assert shard_from(None, None, slurm(2, 4)) == Shard(2, 4)
    assert shard_from(None, None, slurm(6, 4, MIN=0, MAX=6, STEP=2)) == Shard(3, 4)
    assert shard_from(16, None, slurm(7, 1, MIN=7)) == Shard(7, 16)  # task 7 of an array of 16, again


@pytest.mark.parametrize(
    ("num_shards", "shard_index", "environment", "message"),
    [
        (None, 3, {}, "--shard_index is set, but not of how many: give --num_shards"),
        (None, None, {"JOB_COMPLETION_INDEX": "1"}, "JOB_COMPLETION_INDEX is set, but not of how many"),
        (None, None, {"SLURM_ARRAY_TASK_ID": "1"}, "SLURM_ARRAY_TASK_ID is set, but not of how many"),
        (4, None, {}, "give --shard_index"),
        (4, 4, {}, "--shard_index makes this shard 4 of 4; they count from 0"),
        (None, None, slurm(9, 3, MIN=1, STEP=1), "SLURM_ARRAY_TASK_ID makes this shard 8 of 3; .* without gaps"),
        (None, None, slurm("x", 3), "SLURM_ARRAY_TASK_ID is 'x', not a number"),
        (4, None, {"JOB_COMPLETION_INDEX": ""}, "JOB_COMPLETION_INDEX is '', not a number"),
    ],
)
def test_half_a_shard(num_shards, shard_index, environment, message):
    with pytest.raises(ValueError, match=message):
        shard_from(num_shards, shard_index, environment)


def test_help_shows_the_flags():
    command = [sys.executable, "-m", "tspo_jax.predecode", "--help"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    assert "--num_shards: " in shown and "--shard_index: " in shown


def test_shares():
    parts = [Shard(i, 3).of(range(7)) for i in range(3)]
    assert parts == [[0, 3, 6], [1, 4], [2, 5]]
    assert Shard().path(Path("s"), "lock") == Path("s/lock")
    assert Shard(1, 3).path(Path("s"), "bad", ".jsonl") == Path("s/bad-00001-of-00003.jsonl")
