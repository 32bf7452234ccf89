"""What training gains on the toy world, over seeds: for every family of questions the trained agent's accuracy minus
that of uniform sampling and of untrained CLIP top-k, with Student's 95 % interval over the runs.

    bash launch/quickstart.sh                       # makes toy_data
    python -m tspo_jax.toy.videos --output=toy_held_out --num_train=0 --num_eval=192 --seed=1
    python -m tspo_jax.predecode --videos=toy_held_out --store=toy_held_out/frames --clip=tspo_jax/toy/checkpoints/clip
    for seed in $(seq 0 9); do
      for what in train evaluate; do
        python -m tspo_jax.$what --config=configs/toy_full.py --config.seed=$seed --run_dir=runs/toy_full_$seed
      done
    done
    python -m benchmarks.toy_study runs/toy_full_*
"""

import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tspo_jax.evaluation.statistics import Estimate, over_seeds


def read_accuracy(run: Path) -> dict[str, dict[str, float]]:
    """family -> method -> accuracy in %, from the run's last evaluation."""
    summary = json.loads((run / "evaluation" / "summary.json").read_text())
    families: dict[str, dict[str, float]] = {}
    for row in summary["accuracy"]:
        families.setdefault(row["label"], {})[row["method"]] = 100 * row["accuracy"]
    return families


def main(runs: list[Path]) -> None:
    per_run = [read_accuracy(run) for run in runs]
    table = Table("questions", "uniform", "clip-topk", "trained", "- uniform", "- clip-topk", title=f"{len(runs)} runs")
    for family in per_run[0]:

        def over_runs(method, minus=None, family=family):
            return over_seeds([run[family][method] - (run[family][minus] if minus else 0) for run in per_run])

        means = [f"{over_runs(method).value:.1f}" for method in ("uniform", "clip-topk", "topk")]
        gains = [_with_interval(over_runs("topk", other)) for other in ("uniform", "clip-topk")]
        table.add_row(family, *means, *gains)
    Console().print(table)


def _with_interval(estimate: Estimate) -> str:
    if estimate.low is None:
        return f"{estimate.value:+.1f}"
    return f"{estimate.value:+.1f} [{estimate.low:.0f}, {estimate.high:.0f}]"


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    main([Path(run) for run in sys.argv[1:]])
