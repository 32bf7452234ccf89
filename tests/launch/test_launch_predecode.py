"""The pre-decoding jobs for many machines: what they would run."""

import os
import subprocess

import pytest
import yaml
from conftest import ROOT

from tspo_jax.command_line.job_array import Shard, shard_from


def script(name, *args, **variables):
    environment = os.environ | variables
    return subprocess.run(["bash", f"launch/{name}", *args], cwd=ROOT, capture_output=True, text=True, env=environment)


def test_slurm_array():
    done = script("predecode_slurm.sbatch", "--dry-run", "--videos=my videos", "--store=s", SLURM_CPUS_PER_TASK="4")
    assert done.stdout.strip() == r"python -m tspo_jax.predecode --workers=4 --videos=my\ videos --store=s"
    slurm = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "16", "SLURM_ARRAY_TASK_MIN": "0"}
    assert shard_from(None, None, slurm) == Shard(7, 16)


def test_indexed_job():
    flags = "--videos=/data/my videos", '--store=/data/"s"'
    done = script("predecode_job.sh", "--dry-run", "run", *flags, IMAGE="repo/tspo:1", SHARDS="32", CPUS="6")
    command, manifest = done.stdout.split("\n", 1)
    assert command.strip() == "kubectl apply -f -"
    job = yaml.safe_load(manifest)
    assert "${" not in manifest and job["spec"]["completionMode"] == "Indexed" and job["spec"]["completions"] == 32
    container = job["spec"]["template"]["spec"]["containers"][0]
    assert container["command"] == ["python", "-m", "tspo_jax.predecode"] and container["image"] == "repo/tspo:1"
    assert container["args"] == ["--num_shards=32", "--workers=6", *flags]
    assert shard_from(32, None, {"JOB_COMPLETION_INDEX": "31"}) == Shard(31, 32)


def test_other_actions_of_the_job():
    assert script("predecode_job.sh", "--dry-run", "delete", NAME="x").stdout.strip() == "kubectl delete job x"
    assert "batch.kubernetes.io/job-name=predecode" in script("predecode_job.sh", "--dry-run", "logs").stdout


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("predecode_slurm.sbatch", (), "sbatch [--array=0-63 ...]"),
        ("predecode_job.sh", (), "bash launch/predecode_job.sh [--dry-run] run"),
        ("predecode_job.sh", ("run", "--videos=x"), "error: IMAGE is not set"),
        ("predecode_job.sh", ("stop",), "logs | delete"),
    ],
)
def test_usage(name, arguments, message):
    done = script(name, *arguments, IMAGE="")
    assert done.returncode == 1 and message in done.stderr and not done.stdout
