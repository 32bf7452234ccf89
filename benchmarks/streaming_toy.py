"""The streaming encoder on its toy task (toy/streaming_task.py): what the selection and the handed-on memory are for.

    python -m benchmarks.streaming_toy run [--runs=full,last] [--seeds=0,1,2] [--output=runs/streaming_toy.jsonl]
    python -m benchmarks.streaming_toy table [--output=runs/streaming_toy.jsonl]

`run` trains each run with each seed and writes one row of accuracies on 1,024 fresh videos; what the file has is left
out. `table` prints means with Student's 95 % interval over the seeds. Three seeds of the small task, trained beside
each other, take about four processor minutes.
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import NamedTuple

from tspo_jax.data.row_file import RowFile
from tspo_jax.evaluation.statistics import over_seeds
from tspo_jax.models.streaming import StreamingConfig
from tspo_jax.streaming.objective import Schedule
from tspo_jax.toy.streaming_task import Recipe, Task, sizes, train


class Run(NamedTuple):
    meaning: str
    recipe: Recipe
    task: Task = Task()
    cfg: StreamingConfig = sizes(Task())


LONG = Task(clips=12, objects=14, flashes=5)  # more flashes than the picked clips can show
LARGE = Task(clips=8, frames=4, objects=10)  # 16 patches a clip


def large(meaning: str, kept: float, **options) -> Run:
    cfg = sizes(LARGE, width=48, summary=4, **options)
    return Run(f"larger: {meaning}", Recipe(Schedule(1500, 500, kept), learning_rate=1.5e-3), LARGE, cfg)


KEPT = Recipe(Schedule(2000, 700, 0.1))
CONTROL = Recipe(Schedule(1200, 420, 0.1))
COUNTS = Recipe(Schedule(1000, 350, 0.1))
RUNS = {
    "full": Run("selection loss at weight 1 for 700 steps, then 0.1", KEPT),
    "last": Run("the last V clips", dataclasses.replace(CONTROL, selection="last")),
    "uniform": Run("V evenly spaced clips", dataclasses.replace(CONTROL, selection="uniform")),
    "no_labels": Run("no selection loss at all", Recipe(Schedule(1200, 0, 0.0))),
    "long": Run("12 clips, 0-5 flashes", COUNTS, LONG, sizes(LONG)),
    "long_no_memory": Run(
        "12 clips, 0-5 flashes, every clip from the first memory",
        dataclasses.replace(COUNTS, propagate=False),
        LONG,
        sizes(LONG),
    ),
    "large": large("labels end after 500 steps", 0.0),
    "large_scaled": large("labels end, the selection's gradient x 0.1", 0.0, gradient_scale=0.1),
    "large_kept": large("weight 0.1 is kept", 0.1),
    "answer_only": Run("labels end after 700 steps", Recipe(Schedule(2000, 700, 0.0))),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["run", "table"])
    parser.add_argument("--runs", default=",".join(RUNS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--output", type=Path, default=Path("runs/streaming_toy.jsonl"))
    args = parser.parse_args()
    names = args.runs.split(",")
    if unknown := set(names) - set(RUNS):
        parser.error(f"no run {', '.join(sorted(unknown))}; there are {', '.join(RUNS)}")
    with RowFile(args.output) as rows:
        if args.action == "table":
            print(table(list(rows.rows.values()), names))
            return
        for name in names:
            seeds = [seed for seed in map(int, args.seeds.split(",")) if f"{name}/{seed}" not in rows.rows]
            if seeds:
                rows.append([{"id": f"{name}/{row['seed']}", "run": name, **row} for row in measure(RUNS[name], seeds)])


def measure(run: Run, seeds: list[int]) -> list[dict]:
    """The seeds' runs, beside each other, as rows."""
    curves, started = [[] for _ in seeds], time.process_time()

    def report(step: int, accuracies: list[dict[str, float]]) -> None:
        for curve, found in zip(curves, accuracies, strict=True):
            curve.append({"step": step, **{name: round(value, 4) for name, value in found.items()}})
        print(json.dumps([curve[-1] for curve in curves]), flush=True)

    train(run.task, run.cfg, run.recipe, seeds, report)
    spent = round((time.process_time() - started) / len(seeds))
    return [
        {"seed": seed, **curve[-1], "processor_seconds": spent, "curve": curve}
        for seed, curve in zip(seeds, curves, strict=True)
    ]


def table(rows: list[dict], names: list[str]) -> str:
    lines = ["| run | lookups | counts | evidence picked | seeds |", "|---|---|---|---|---|"]
    for name in names:
        of_run = [row for row in rows if row["run"] == name]
        if of_run:
            shown = [interval([row[field] for row in of_run]) for field in ("lookup", "count", "found")]
            lines.append(f"| {RUNS[name].meaning} | {' | '.join(shown)} | {len(of_run)} |")
    return "\n".join(lines)


def interval(values: list[float]) -> str:
    value, low, high = over_seeds(values)
    return f"{value:.3f}" if low is None else f"{value:.3f} [{low:.3f}, {high:.3f}]"


if __name__ == "__main__":
    main()
