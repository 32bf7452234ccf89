"""The streaming encoder on its toy task (toy/streaming_task.py): what the selection and the handed-on memory are for.

    python -m benchmarks.streaming_toy run [--runs=full,last] [--seeds=0,1,2] [--output=runs/streaming_toy.jsonl]
    python -m benchmarks.streaming_toy table [--output=runs/streaming_toy.jsonl]

`run` trains each run with each seed and writes a row of accuracies on 1,024 fresh videos; what the file has is left
out. `table` prints means with Student's 95 % interval over the seeds. A run of the small task takes one to two minutes;
JAX_COMPILATION_CACHE_DIR saves compiling again.
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import NamedTuple

from flax import nnx

from tspo_jax.data.row_file import RowFile
from tspo_jax.evaluation.statistics import over_seeds
from tspo_jax.models.streaming import StreamingConfig
from tspo_jax.streaming.objective import Schedule
from tspo_jax.toy.streaming_task import Recipe, State, Task, accuracies, sizes, train


class Run(NamedTuple):
    meaning: str
    recipe: Recipe = Recipe()
    task: Task = Task()
    cfg: StreamingConfig = sizes(Task())


# Of long streams at once counting is not learnt.
BY_LENGTH = Recipe(Schedule(2000, 600, 0.1), short=800)
BY_LENGTH_FREE = Recipe(Schedule(2000, 600, 0.0), short=800)
LONG = Task(clips=12, objects=14, flashes=5)  # more flashes than the picked clips can show
LARGE = Task(clips=8, frames=4, objects=10)  # 16 patches a clip


WIDE = sizes(LARGE, width=48, summary=4)
SCALED = dataclasses.replace(WIDE, gradient_scale=0.1)
FREE = Recipe(Schedule(Recipe.schedule.steps, Recipe.schedule.labelled_steps, 0.0))
RUNS = {
    "full": Run("labels at weight 1, then 0.1"),
    "answer_only": Run("labels end", FREE),
    "answer_only_scaled": Run(
        "labels end, the selection's gradient x 0.1", FREE, cfg=sizes(Task(), gradient_scale=0.1)
    ),
    "last": Run("the last V clips", Recipe(selection="last")),
    "uniform": Run("V evenly spaced clips", Recipe(selection="uniform")),
    "no_labels": Run("no selection loss at all", Recipe(Schedule(Recipe.schedule.steps, 0, 0.0))),
    "long": Run("12 clips, 0-5 flashes", BY_LENGTH, LONG, sizes(LONG)),
    "long_no_memory": Run(
        "12 clips, 0-5 flashes, every clip from the first memory",
        dataclasses.replace(BY_LENGTH, propagate=False),
        LONG,
        sizes(LONG),
    ),
    "large": Run("larger: labels end", BY_LENGTH_FREE, LARGE, WIDE),
    "large_scaled": Run("larger: labels end, the selection's gradient x 0.1", BY_LENGTH_FREE, LARGE, SCALED),
    "large_kept": Run("larger: weight 0.1 is kept", BY_LENGTH, LARGE, WIDE),
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
        for seed in map(int, args.seeds.split(",")):
            for name in names:
                if f"{name}/{seed}" not in rows.rows:
                    rows.append([{"id": f"{name}/{seed}", "run": name, "seed": seed, **measure(RUNS[name], seed)}])


def measure(run: Run, seed: int) -> dict:
    """A run's row; `curve` has the accuracies on the way."""
    curve, started = [], time.process_time()

    def report(step: int, graphdef: nnx.GraphDef, state: State) -> None:
        found = accuracies(graphdef, state.params, run.task, run.recipe)
        curve.append({"step": step, **{name: round(value, 4) for name, value in found.items()}})
        print(json.dumps({"seed": seed, **curve[-1]}), flush=True)

    train(run.task, run.cfg, run.recipe, seed, report)
    return {**curve[-1], "processor_seconds": round(time.process_time() - started), "curve": curve}


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
