"""What the intervals and claims of an evaluation hold: coverage, and how often equal methods are called different.

    python -m benchmarks.interval_coverage [--annotations=DIR] [--trials=1000] [--output=FILE.json]

Videos have accuracies of a Beta(2, 2) distribution and three questions each. A summary is simulated with the questions,
videos and groups of LongVideoBench and Video-MME where --annotations has their files (lvb_val.json, videomme.json): two
trained methods and two baselines that are all equally good, at two budgets; counted are summaries with any difference
that is not marked as noise.
"""

import json
import sys
from pathlib import Path

import numpy as np
from absl import app, flags

from tspo_jax.evaluation import benchmarks, results, statistics

FLAGS = flags.FLAGS
FILES = {"longvideobench": "lvb_val.json", "videomme": "videomme.json"}


def coverage(videos: int, trials: int, resamples: int = 2000) -> dict:
    """Of intervals, as shares of those that are given; and claims of a difference between equal methods."""
    names = np.repeat(np.arange(videos).astype(str), 3)
    given = covered = claimed = 0
    for trial in range(trials):
        rng = np.random.default_rng(1000 * videos + trial)
        p = np.repeat(rng.beta(2, 2, videos), 3)
        a, b = rng.random(len(p)) < p, rng.random(len(p)) < p
        estimate = statistics.clustered_mean(a, names, 0, resamples)
        given += estimate.low is not None
        covered += estimate.low is not None and estimate.low <= 0.5 <= estimate.high
        claimed += not statistics.paired_difference(a, b, names, 0, resamples).inside_noise
    return {"videos": videos, "given": given / trials, "covered": covered / max(given, 1), "claimed": claimed / trials}


def simulated_rows(items: list, seed: int) -> list[dict]:
    """Rows of an evaluation in which all methods are right equally often."""
    rng = np.random.default_rng(seed)
    videos = {item.video: rng.beta(2, 2) for item in items}
    rows = []
    for item in items:
        known = rng.random() < 0.8  # most questions are answered alike, whatever the frames
        alike = rng.random() < videos[item.video]
        for method in ("uniform", "clip-topk", "topk", "aks"):
            for k in (8, 16):
                correct = alike if known else rng.random() < videos[item.video]
                row = {"id": item.id, "video": item.video, "method": method, "k": k, "correct": bool(correct)}
                rows.append(row | {"letter": "A", "groups": {name: list(x) for name, x in item.groups.items()}})
    return rows


def summaries(benchmark: str, path: Path, trials: int) -> dict:
    items = benchmarks.read_items(benchmark, path)
    unmarked = differences = 0
    for trial in range(trials):
        found = results.summarize(simulated_rows(items, trial), ("topk", "aks"))["differences"]
        differences = len(found)
        unmarked += any(not row["inside_noise"] for row in found)
    return {"benchmark": benchmark, "differences": differences, "trials": trials, "with_a_claim": unmarked / trials}


def main(_) -> None:
    result = {"coverage": [], "summaries": []}
    for videos in (2, 3, 5, 8, 10, 12, 20, 100):
        result["coverage"].append(coverage(videos, FLAGS.trials))
        print(result["coverage"][-1], file=sys.stderr)
    for benchmark, name in FILES.items() if FLAGS.annotations else ():
        result["summaries"].append(summaries(benchmark, Path(FLAGS.annotations) / name, FLAGS.summaries))
        print(result["summaries"][-1], file=sys.stderr)
    text = json.dumps(result) + "\n"
    Path(FLAGS.output).write_text(text) if FLAGS.output else sys.stdout.write(text)


if __name__ == "__main__":
    flags.DEFINE_string("annotations", "", "Folder of lvb_val.json and videomme.json.")
    flags.DEFINE_integer("trials", 1000, "Simulations of each number of videos.", lower_bound=1)
    flags.DEFINE_integer("summaries", 100, "Simulated summaries of each benchmark.", lower_bound=1)
    flags.DEFINE_string("output", "", "JSON file to write; stdout if empty.")
    app.run(main)
