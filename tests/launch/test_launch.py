"""The launch scripts: --dry-run prints the exact commands, mistakes print the usage, and local.sh ends as it should."""

import json
import os
import shlex
import shutil
import subprocess

import pytest
import yaml
from conftest import ROOT

OVERRIDE = '--config.mesh.axes=(("data", 2), ("model", 4))'


def dry_run(script, *arguments, **environment):
    command = ["bash", str(ROOT / "launch" / script), "--dry-run", *arguments]
    kept = {name: value for name, value in os.environ.items() if name not in ("NAME", "ZONE", "TYPE", "PROJECT")}
    done = subprocess.run(command, capture_output=True, text=True, env=kept | environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def commands(text):
    return [shlex.split(line) for line in text.splitlines()]


def test_local():
    first, second = commands(dry_run("local.sh", "2", "tspo_jax.train", "--config=x.py", OVERRIDE, GPUS="1", PORT="99"))
    assert first[:6] == ["CUDA_VISIBLE_DEVICES=0", "python", "-m", "tspo_jax.train", "--config=x.py", OVERRIDE]
    distributed = ["--config.distributed.enabled=True", "--config.distributed.coordinator=127.0.0.1:99"]
    assert first[6:] == [*distributed, "--config.distributed.num_processes=2", "--config.distributed.process_id=0"]
    assert second[0] == "CUDA_VISIBLE_DEVICES=1" and second[-1] == "--config.distributed.process_id=1"


def test_slurm():
    (command,) = commands(dry_run("slurm.sbatch", "--config=x.py", OVERRIDE))
    assert command == [
        "srun", "--kill-on-bad-exit=1", "python", "-m", "tspo_jax.train", "--config=x.py", OVERRIDE,
        "--config.distributed.enabled=True",
    ]  # fmt: skip


def test_slurm_runs_a_copy_of_the_script(tmp_path):
    for script in ("slurm.sbatch", "predecode_slurm.sbatch"):
        copy = shutil.copy(ROOT / "launch" / script, tmp_path / "slurm_script")
        environment = os.environ | {"SLURM_SUBMIT_DIR": str(ROOT)}
        command = ["bash", copy, "--dry-run", "--store=x"]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0 and "--store=x" in commands(done.stdout)[0], done.stderr


def test_tpu_vm():
    tpu = ["gcloud", "compute", "tpus", "tpu-vm"]
    (create,) = commands(dry_run("tpu_vm.sh", "create", NAME="a", ZONE="z", TYPE="v6e-8", VERSION="v", SPOT="1"))
    assert create == [*tpu, "create", "a", "--zone=z", "--accelerator-type=v6e-8", "--version=v", "--spot"]
    archive, copy, install = commands(dry_run("tpu_vm.sh", "setup", PROJECT="p"))
    assert archive[0] == "git" and copy[: len(tpu) + 1] == [*tpu, "scp"] and copy[-1] == "--worker=all"
    assert "--project=p" in copy and "jax[tpu]" in install[-1]
    (run,) = commands(dry_run("tpu_vm.sh", "run", "--config=x.py", OVERRIDE))
    assert run[: len(tpu) + 2] == [*tpu, "ssh", "tspo"] and "--worker=all" in run
    inner = shlex.split(run[-1].partition("tspo_jax.train ")[2].partition(" >>train.log")[0])
    assert inner == ["--config=x.py", OVERRIDE, "--config.distributed.enabled=True"]
    (run,) = commands(dry_run("tpu_vm.sh", "run", "--config=x.py", JAX_COMPILATION_CACHE_DIR="/data/a b"))
    assert r"nohup env JAX_COMPILATION_CACHE_DIR=/data/a\ b python -m" in run[-1]
    assert (
        "--worker=0" in dry_run("tpu_vm.sh", "logs") and "kill -TERM" in shlex.split(dry_run("tpu_vm.sh", "stop"))[-1]
    )
    assert commands(dry_run("tpu_vm.sh", "delete")) == [[*tpu, "delete", "tspo", "--zone=us-east5-a", "--quiet"]]


def test_gke_jobset():
    text = dry_run("gke_jobset.sh", "run", "--config=x.py", OVERRIDE, IMAGE="r/tspo:1", HOSTS="2", NAME="n")
    command, _, manifest = text.partition("\n")
    assert shlex.split(command) == ["kubectl", "apply", "-f", "-"]
    manifest = yaml.safe_load(manifest)
    assert manifest["metadata"]["name"] == "n"
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["parallelism"] == job["completions"] == 2
    (container,) = job["template"]["spec"]["containers"]
    assert container["image"] == "r/tspo:1" and container["resources"]["limits"] == {"google.com/tpu": 4}
    assert container["args"] == ["--config=x.py", OVERRIDE, "--config.distributed.enabled=True"]
    assert "${" not in json.dumps(manifest)


@pytest.mark.parametrize(
    ("script", "arguments"),
    [("local.sh", ["x"]), ("local.sh", []), ("slurm.sbatch", []), ("tpu_vm.sh", ["jump"]), ("gke_jobset.sh", [])],
)
def test_mistakes_print_the_usage(script, arguments):
    done = subprocess.run(["bash", str(ROOT / "launch" / script), *arguments], capture_output=True, text=True)
    assert done.returncode == 1 and f"bash launch/{script}" in done.stderr and "--dry-run" in done.stderr
    assert not done.stdout


def local(tmp_path, module):
    """local.sh with two processes of a tiny module, in a copy whose set-up does nothing."""
    (tmp_path / "launch").mkdir()
    for script in ("local.sh", "command_line.sh"):
        shutil.copy(ROOT / "launch" / script, tmp_path / "launch")
    (tmp_path / "launch" / "setup.sh").write_text("")
    (tmp_path / "tiny.py").write_text(module)
    command = ["bash", "launch/local.sh", "2", "tiny"]
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)


def test_local_stops_all_when_one_fails(tmp_path):
    module = "import sys, time\nif sys.argv[-1].endswith('=1'): sys.exit(3)\ntime.sleep(50)\n"
    assert local(tmp_path, module).returncode == 3


def test_local_gives_back_the_status_of_a_preempted_run(tmp_path):
    done = local(tmp_path, "import sys\nprint(sys.argv[-1])\nsys.exit(75 * sys.argv[-1].endswith('=1'))\n")
    assert done.returncode == 75 and done.stdout == "--config.distributed.process_id=0\n"
    assert (tmp_path / "local_1.log").read_text() == "--config.distributed.process_id=1\n"
