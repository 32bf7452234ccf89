"""launch/quickstart.sh: which commands it runs; what they do is tested at each of them."""

import json
import os
import shutil
import subprocess
import sys

from conftest import ROOT


def commands(folder, *arguments, fails="none"):
    """How the script ends, and the arguments of each start, in a copy whose set-up does nothing and whose python only
    notes them; of the start that has the argument `fails` it says so and fails."""
    (folder / "launch").mkdir()
    shutil.copy(ROOT / "launch" / "quickstart.sh", folder / "launch")
    (folder / "launch" / "setup.sh").write_text('set -euo pipefail\nPATH="$PWD:$PATH"\n')
    noting = "import json, sys; print(json.dumps(sys.argv[2:]), file=open('started', 'a'))\n"
    noting += f"if {fails!r} in sys.argv: sys.exit('no such thing')"
    (folder / "python").write_text(f"#!{sys.executable}\n{noting}\n")
    (folder / "python").chmod(0o755)
    command = ["bash", "launch/quickstart.sh", *arguments]
    kept = {name: value for name, value in os.environ.items() if name not in ("DATA", "RUN", "PLUS")}
    done = subprocess.run(command, cwd=folder, env=kept, capture_output=True, text=True)
    started = [json.loads(line) for line in (folder / "started").read_text().splitlines()]
    started[2:5] = sorted(started[2:5], key=lambda command: (command[0] != "tspo_jax.train", command[-1]))  # at once
    return done, started


def test_both_agents_share_data_and_questions(tmp_path):
    done, started = commands(tmp_path, "--config.seed=1")
    assert done.returncode == 0, done.stderr
    modules = [command[0].removeprefix("tspo_jax.") for command in started]
    assert modules == ["toy.videos", "predecode", "train", "train", "evaluate", "evaluate", "report"]
    of_config = [[a for a in command if a.startswith("--config.")] for command in started[2:6]]
    assert of_config[0] == of_config[1] == of_config[2] == of_config[3] and "--config.seed=1" in of_config[0]
    runs = [[a for a in command if a.startswith(("--config=", "--run_dir="))] for command in started[2:6]]
    paper = ["--config=configs/toy.py", "--run_dir=runs/toy"]
    plus = ["--config=configs/toy_plus.py:quick", "--run_dir=runs/toy_plus"]
    assert runs == [paper, plus, paper, plus]
    assert "--beside=runs/toy" in started[5] and started[6][1:] == ["runs/toy_plus"]


def test_a_training_that_fails_ends_it_and_is_shown(tmp_path):
    done, started = commands(tmp_path, fails="--run_dir=runs/toy")
    assert done.returncode == 1 and "no such thing" in done.stderr
    assert [command[0] for command in started[2:]] == ["tspo_jax.train", "tspo_jax.train"]
    (tmp_path / "other").mkdir()
    done, _ = commands(tmp_path / "other", fails="--run_dir=runs/toy_plus")
    assert done.returncode == 1


def test_help():
    done = subprocess.run(
        ["bash", str(ROOT / "launch" / "quickstart.sh"), "--help"], capture_output=True, text=True, check=True
    )
    assert "bash launch/quickstart.sh [--config.seed=1 ...]" in done.stdout and "source" not in done.stdout
