"""Kills a training with kill -9 at random moments until it is done, and compares it with an undisturbed one.

    bash launch/quickstart.sh                                  # makes toy_data
    python -m benchmarks.kill_resume --kills=20 --folder=runs/kill_resume [--processes=2] -- \\
        --config=configs/toy.py --config.num_steps=60 --config.checkpoint_every=5
    python -m benchmarks.kill_resume --trainer=train_answerer --kills=20 --folder=runs/kill_resume_answerer -- \\
        --config=configs/tpo_toy.py --config.num_steps=60 --config.checkpoint_every=5

What follows `--` are the arguments of the trainer, tspo_jax.train or tspo_jax.train_answerer. With two processes one of
them is killed, and the other must end by itself. Prints one JSON object; exit status 1 where a parameter, or the picks
(of train_answerer: the metrics) of any step at any attempt, differ by a bit. --folder must not exist.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from tspo_jax.runs.run_folder import read_part
from tspo_jax.selection.scoring import read_agent
from tspo_jax.tpo.trained import PART

ROOT = Path(__file__).resolve().parent.parent
PEER_SECONDS = 150  # in which the other process must end; jax gives up on a silent one after 100


class Trainer(NamedTuple):
    """A trainer whose processes write down, line by line, [step, hash] of what each attempt at a step came to.

    `recorded` names what that is, `recording` is the program, and `parameters` reads what a run has trained.
    """

    recorded: str
    recording: str
    parameters: Callable[[Path], dict]


_WRITE = """
import hashlib, json, os

def write(step, content):
    with open(os.environ["TSPO_STEPS"], "a") as file:
        file.write(json.dumps([step, hashlib.sha256(content).hexdigest()]) + "\\n")
"""
TRAINERS = {
    "train": Trainer(
        "picks",
        _WRITE
        + """
from tspo_jax import config, train
from tspo_jax.tspo import actor
from tspo_jax.command_line import entry_point

def draw(self, step, *args, original=actor.Actor.draw, **kwargs):
    drawn = original(self, step, *args, **kwargs)
    write(step, drawn.picks.tobytes())
    return drawn

actor.Actor.draw = draw
train.define_flags()
entry_point.run(train.main, check=config.check_overrides)
""",
        read_agent,
    ),
    "train_answerer": Trainer(
        "metrics",
        _WRITE
        + """
from functools import partial
from tspo_jax import config, train_answerer
from tspo_jax.command_line import entry_point
from tspo_jax.runs.loop import define_flags, run_from_flags
from tspo_jax.tpo import training
from tspo_jax.tpo.config import TpoConfig

def check(of_config, row, original=training.check_first_step):
    kept = {name: x for name, x in row.items() if name in training.COLUMNS and not name.startswith("seconds/")}
    kept.pop("compilations")
    write(row["step"], json.dumps(kept, sort_keys=True).encode())
    return original(of_config, row)

training.check_first_step = check
define_flags()
entry_point.run(
    lambda: run_from_flags(TpoConfig, train_answerer.train), check=partial(config.check_overrides, kind=TpoConfig)
)
""",
        partial(read_part, name=PART),
    ),
}


class Run:
    """The processes of one start of a training; `seconds` since then."""

    def __init__(self, folder: Path, arguments: Sequence[str], num_processes: int, trainer: str = "train"):
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / "stderr.txt"
        port, self._start = _free_port(), time.perf_counter()
        self.processes = []
        for i in range(num_processes):
            joined = [
                "--config.distributed.enabled=True",
                f"--config.distributed.coordinator=127.0.0.1:{port}",
                f"--config.distributed.num_processes={num_processes}",
                f"--config.distributed.process_id={i}",
            ]
            command = [sys.executable, "-c", TRAINERS[trainer].recording, *arguments, f"--run_dir={folder}"]
            environment = os.environ | {
                "TSPO_STEPS": str(folder / f"attempts_{i}.jsonl"),
                "JAX_COMPILATION_CACHE_DIR": str(folder.parent / "compiled"),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            }
            with self.log.open("ab") as log:
                started = subprocess.Popen(
                    command + (joined if num_processes > 1 else []), cwd=ROOT, env=environment, stdout=log, stderr=log
                )
            self.processes.append(started)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start

    def wait(self, timeout: float | None = None) -> list[int]:
        """Exit statuses; raises subprocess.TimeoutExpired where a process is still there after `timeout` seconds."""
        end = None if timeout is None else time.perf_counter() + timeout
        try:
            return [p.wait(None if end is None else max(0.1, end - time.perf_counter())) for p in self.processes]
        except subprocess.TimeoutExpired:
            for process in self.processes:
                process.kill()
            raise

    def check(self) -> None:
        """Waits for the end; raises RuntimeError where it was not a success."""
        if any(statuses := self.wait()):
            raise RuntimeError(f"training ended with {statuses}: {self.said()}")

    def said(self) -> str:
        return self.log.read_text()[-2000:]

    def is_running(self) -> bool:
        return all(process.poll() is None for process in self.processes)

    def has_done(self, step: int, since: float) -> bool:
        """Whether the log has `step` rows, one of them written after the time `since`."""
        metrics = self.log.parent / "metrics.jsonl"
        return metrics.is_file() and metrics.stat().st_mtime > since and num_rows(metrics.parent) >= step


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def num_rows(folder: Path) -> int:
    """Steps in the log of a run."""
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def undisturbed(
    folder: Path, arguments: Sequence[str], num_processes: int = 1, trainer: str = "train"
) -> tuple[float, float]:
    """Trains in one go: seconds until the first step was done, and of each further step."""
    run, when = (
        Run(folder, arguments, num_processes, trainer),
        {},
    )  # rows in the log -> seconds when they were first there
    while run.is_running():
        when.setdefault(num_rows(folder), run.seconds)
        time.sleep(0.02)
    run.check()
    seen = sorted(rows for rows in when if rows)
    return when[seen[0]], (when[seen[-1]] - when[seen[0]]) / seen[-1]


def disturbed(
    folder: Path,
    arguments: Sequence[str],
    kills: int,
    pace: tuple[float, float],
    num_steps: int,
    num_processes: int = 1,
    seed: int = 0,
    trainer: str = "train",
) -> list[dict]:
    """Kills one process `kills` times at random moments, or as often as there is time for, then lets the training end.

    A moment is within a step, equally often each of the next ones, up to three times a kill's share of the steps; or in
    the start, before the first of them.

    Args:
      pace: of `undisturbed`.

    Returns: of each kill, `process`, `after` (seconds), `steps` (in the log), and with several processes `others_ended`
    (seconds that the others took to) and `statuses`.
    """
    rng, done = random.Random(seed), []
    start_seconds, step_seconds = pace
    while len(done) < kills:
        saved = max((int(p.name) for p in (folder / "checkpoints").glob("*") if p.name.isdigit()), default=0)
        further = rng.randint(0, max(0, min(num_steps - saved - 2, 3 * num_steps // kills)))
        within = rng.uniform(0, step_seconds)
        # Processes that lack one from the start wait for it for minutes, so several are left to meet.
        latest = float("inf") if further else rng.uniform(0.5 if num_processes > 1 else 0.0, 1.0) * start_seconds
        run, began = Run(folder, arguments, num_processes, trainer), time.time()
        while run.is_running() and run.seconds < latest and not run.has_done(saved + max(further, 1), began):
            time.sleep(0.005)
        time.sleep(within if further else 0)
        victim = rng.randrange(num_processes)
        run.processes[victim].kill()
        killed = run.seconds
        statuses = run.wait(PEER_SECONDS)
        if not any(statuses):
            return done  # it was faster than the undisturbed run
        if statuses[victim] != -signal.SIGKILL:
            raise RuntimeError(f"training ended with {statuses} before it was killed: {run.said()}")
        report = {"process": victim, "after": round(killed, 2), "steps": num_rows(folder)}
        if num_processes > 1:
            report |= {"others_ended": round(run.seconds - killed, 2), "statuses": statuses}
        done.append(report)
        print(report, file=sys.stderr, flush=True)
    Run(folder, arguments, num_processes, trainer).check()
    return done


def compare(expected: Path, found: Path, trainer: str = "train") -> dict:
    """Whether two runs are the same: `parameters`, `picks` or `metrics` (each attempt at a step); `steps_redone`."""
    recorded, _, parameters_of = TRAINERS[trainer]
    leaves = [jax.tree.leaves(parameters_of(folder)) for folder in (expected, found)]
    parameters = all(np.array_equal(a, b) for a, b in zip(*leaves, strict=True))
    same, redone = True, 0
    for path in sorted(expected.glob("attempts_*.jsonl")):
        once = dict(map(json.loads, path.read_text().splitlines()))
        again = list(map(json.loads, (found / path.name).read_text().splitlines()))
        same &= {step for step, _ in again} == set(once) and all(once[step] == digest for step, digest in again)
        redone += len(again) - len(once)
    digest = hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in leaves[1])).hexdigest()[:16]
    return {"parameters": parameters, recorded: same, "steps_redone": redone, "sha256": digest}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainer", choices=list(TRAINERS), default="train")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("arguments", nargs="*")
    args = parser.parse_args()
    if args.folder.exists():
        parser.error(f"{args.folder} exists")
    whole, killed = args.folder / "whole", args.folder / "killed"
    pace = undisturbed(whole, args.arguments, args.processes, args.trainer)
    kills = disturbed(
        killed, args.arguments, args.kills, pace, num_rows(whole), args.processes, args.seed, args.trainer
    )
    result = compare(whole, killed, args.trainer)
    print(json.dumps({"kills": kills, "processes": args.processes, **result}))
    return 0 if result["parameters"] and result[TRAINERS[args.trainer].recorded] else 1


if __name__ == "__main__":
    sys.exit(main())
