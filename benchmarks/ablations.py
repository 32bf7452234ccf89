"""The ablation study on the toy world: the paper's recipe against each option of this project, over seeds.

    bash launch/quickstart.sh                                # makes toy_data; benchmarks/toy_study.py says what makes
                                                             # toy_held_out
    python -m benchmarks.ablations run [--folder=runs/ablations] [--seeds=0,1,2] [--variants=paper,plus]
    python -m benchmarks.ablations write [--folder=runs/ablations]        # docs/ablations.md and its figures

`run` trains and evaluates each variant with each seed, one after another; stopped, it goes on where it was. `write`
takes what is there: accuracy on held-out questions by family with Student's 95 % interval over the seeds, the
difference to the paper's recipe with the same seeds, and how often a run ends below untrained CLIP top-k. The findings
at the head of the document are written by hand, and kept.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tspo_jax.evaluation.statistics import Estimate, over_seeds
from tspo_jax.pages.charts import smooth
from tspo_jax.runs.metrics import read_rows

ROOT = Path(__file__).resolve().parent.parent
FAMILIES = ("all", "lookup", "position", "relation")
UNTRAINED = "untrained"  # folder of the evaluation of the methods without an agent
MARK = "<!-- From here on written by `python -m benchmarks.ablations write`. -->\n"  # what is before it is kept


class Variant(NamedTuple):
    """What is changed in the paper's recipe: `config.`-fields without the prefix."""

    meaning: str
    fields: Mapping[str, object]


PROBABILITY = {"data.general.probability": 1.0, "data.specific.probability": 1.0}
QUESTION_AWARE = {"agent.kind": "question_aware"}
WARM = {"policy.warm_start_steps": 100}
GRADED = PROBABILITY | {"data.general.accuracy": 0.0, "data.specific.accuracy": 0.0, "policy.advantage": "dr_grpo"}
PLUS = QUESTION_AWARE | WARM | GRADED
VARIANTS = {
    "paper": Variant("the paper's recipe", {}),
    "dr_grpo": Variant("advantages not divided by the standard deviation", {"policy.advantage": "dr_grpo"}),
    "leave_one_out": Variant("advantages relative to the others' mean", {"policy.advantage": "leave_one_out"}),
    "plackett_luce": Variant("exact log-probability of the draw", {"policy.log_prob": "plackett_luce"}),
    "inner_steps": Variant("2 updates per rollout, ratio clipped at 0.2", {"policy.inner_steps": 2}),
    "skip_dead": Variant("dead groups do not count", {"policy.dead_groups": "skip"}),
    "resample_dead": Variant("dead groups are drawn again, twice at most", {"policy.dead_groups": "resample"}),
    "entropy": Variant("entropy bonus 0.01", {"policy.entropy": 0.01}),
    "kl": Variant("KL penalty 0.01", {"policy.kl": 0.01}),
    "kl_limit": Variant("updates further than 1 nat from the initial agent are undone", {"policy.kl_limit": 1.0}),
    "coverage": Variant("coverage reward 0.2", {"data.general.coverage": 0.2, "data.specific.coverage": 0.2}),
    "probability": Variant("reward + probability of the right option", PROBABILITY),
    "margin": Variant(
        "reward + 0.2 margin of the right option", {"data.general.margin": 0.2, "data.specific.margin": 0.2}
    ),
    "random_k": Variant("K of a step is 4, 8 or 16", {"policy.random_k": (4, 8, 16)}),
    "warm_start": Variant("the first 100 steps on labels", WARM),
    "question_aware": Variant("question-aware agent", QUESTION_AWARE),
    "aware_labels": Variant("question-aware agent, the first 100 steps on labels", QUESTION_AWARE | WARM),
    "plus": Variant("what configs/toy_plus.py changes, the first 100 steps on labels", PLUS),
}


# ---- run -------------------------------------------------------------------------------------------------


def arguments(data: Path, held_out: Path, fields: Mapping[str, object]) -> list[str]:
    """Of train and evaluate: training questions of the folder `data`, evaluation questions of `held_out`."""
    fields = {
        "data.store": data / "frames",
        "data.questions": data / "train.jsonl",
        "evaluation.store": held_out / "frames",
        "evaluation.questions": held_out / "eval.jsonl",
        **fields,
    }
    return ["--config=configs/toy_full.py", *(f"--config.{name}={value}" for name, value in fields.items())]


def call(module: str, *arguments: str) -> None:
    """Runs an entry point; raises subprocess.CalledProcessError where it fails."""
    subprocess.run([sys.executable, "-m", f"tspo_jax.{module}", *arguments], cwd=ROOT, check=True)


def run(
    folder: Path,
    data: Path,
    held_out: Path,
    variants: Iterable[str],
    seeds: Iterable[int],
    fields: Mapping[str, object],
) -> None:
    """Trains and evaluates what is not done yet; every variant with the first seed before any with the next."""
    untrained = folder / UNTRAINED
    if not (untrained / "evaluation.json").is_file():
        methods = {"evaluation.methods": ("uniform", "clip-topk")}
        clip = "--agent=tspo_jax/toy/checkpoints/clip"
        output = f"--output={untrained / 'evaluation.json'}"
        call("evaluate", *arguments(data, held_out, methods), f"--run_dir={untrained}", clip, output)
    for seed in seeds:
        for name in variants:
            target = folder / name / str(seed)
            if (target / "evaluation.json").is_file():
                continue
            print(f"{name}, seed {seed}", file=sys.stderr, flush=True)
            settings = {**fields, **VARIANTS[name].fields, "seed": seed, "evaluation.methods": ("topk",)}
            given = [*arguments(data, held_out, settings), f"--run_dir={target}"]
            call("train", *given)
            call("evaluate", *given, f"--output={target / 'evaluation.json'}")


# ---- write -----------------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """Of one run: accuracy in % by family, and its curve of training accuracy over questions."""

    accuracy: dict[str, float]
    questions: np.ndarray
    curve: np.ndarray


def read_accuracy(path: Path) -> dict[str, dict[str, float]]:
    """method -> family -> accuracy in %, of an evaluation's summary."""
    found: dict[str, dict[str, float]] = {}
    for row in json.loads(path.read_text())["accuracy"]:
        found.setdefault(row["method"], {})[row["label"]] = 100 * row["accuracy"]
    return found


def read_outcome(run: Path) -> Outcome:
    rows = [row for row in read_rows(run / "metrics.jsonl") if "accuracy/general" in row]
    batch = json.loads((run / "config.json").read_text())["batch_size"]
    steps, values = (np.array([row[name] for row in rows]) for name in ("step", "accuracy/general"))
    return Outcome(read_accuracy(run / "evaluation.json")["topk"], batch * steps, 100 * smooth(values))


def read_study(folder: Path) -> dict[str, dict[int, Outcome]]:
    """variant -> seed -> outcome, of the runs that are done."""
    found = {}
    for name in VARIANTS:
        done = sorted((folder / name).glob("*/evaluation.json"), key=lambda path: int(path.parent.name))
        if done:
            found[name] = {int(path.parent.name): read_outcome(path.parent) for path in done}
    return found


def against(runs: Mapping[int, Outcome], others: Mapping[int, Outcome], family: str) -> Estimate | None:
    """Difference of accuracies with the same seeds; None where there is no common one."""
    common = sorted(runs.keys() & others.keys())
    if not common:
        return None
    return over_seeds([runs[seed].accuracy[family] - others[seed].accuracy[family] for seed in common])


def text_of(estimate: Estimate | None, sign: str = "") -> str:
    if estimate is None:
        return ""
    interval = "" if estimate.low is None else f" [{estimate.low:.0f}, {estimate.high:.0f}]"
    return f"{estimate.value:{sign}.1f}{interval}"


def document(study: Mapping[str, Mapping[int, Outcome]], untrained: Mapping[str, Mapping[str, float]]) -> str:
    """The part of docs/ablations.md behind MARK."""
    paper = study["paper"]
    families = [family for family in FAMILIES if family in untrained["clip-topk"]]
    lines = [
        "## Results",
        "",
        "Accuracy in % on held-out questions with K = 8, the mean over seeds with Student's 95 % interval.",
        "",
        f"| variant | seeds | {' | '.join(families)} |",
        f"|---|---|{'---|' * len(families)}",
        *(
            f"| {name}, untrained | | {' | '.join(f'{untrained[name][family]:.1f}' for family in families)} |"
            for name in ("uniform", "clip-topk")
        ),
    ]
    for name, runs in study.items():
        cells = [text_of(over_seeds([run.accuracy[family] for run in runs.values()])) for family in families]
        lines.append(f"| {name} | {len(runs)} | {' | '.join(cells)} |")
    lines += [
        "",
        "![Accuracy minus that of untrained CLIP top-k](ablations/gains.svg)",
        "",
        "## Against the paper's recipe",
        "",
        "Differences in points to the paper's recipe with the same seeds; an interval that holds 0 shows nothing. "
        "`below CLIP` counts runs that end below untrained CLIP top-k on lookups, `spread` is the standard deviation "
        "over seeds (points, all questions).",
        "",
        f"| variant | what is changed | {' | '.join(families)} | below CLIP | spread |",
        f"|---|---|{'---|' * len(families)}---|---|",
    ]
    for name, runs in study.items():
        cells = ["" if name == "paper" else text_of(against(runs, paper, family), "+") for family in families]
        spread = f"{np.std([run.accuracy['all'] for run in runs.values()], ddof=1):.1f}" if len(runs) > 1 else ""
        below = sum(run.accuracy["lookup"] < untrained["clip-topk"]["lookup"] for run in runs.values())
        cells += [f"{below} of {len(runs)}", spread]
        lines.append(f"| {name} | {VARIANTS[name].meaning} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", "![Training accuracy](ablations/curves.svg)", ""])


def gains_figure(study: Mapping[str, Mapping[int, Outcome]], untrained: Mapping[str, Mapping[str, float]]) -> str:
    """SVG: of each variant and family, every run as a dot and their mean as a line, relative to CLIP top-k."""
    families = [family for family in FAMILIES if family in untrained["clip-topk"]]
    base = untrained["clip-topk"]
    gains = {
        (name, family): [run.accuracy[family] - base[family] for run in runs.values()]
        for name, runs in study.items()
        for family in families
    }
    low, high = (f(value for values in gains.values() for value in values) for f in (min, max))
    low, high = min(low, 0) - 2, max(high, 0) + 2
    left, width, row = 120, 190, 22
    height = 40 + row * len(study) + 42
    parts = []
    for column, family in enumerate(families):
        start = left + column * (width + 20)

        def x(value, start=start):
            return start + (value - low) / (high - low) * width

        parts.append(f"<text x='{start}' y='22' class='head'>{family}</text>")
        parts.append(f"<line x1='{x(0):.1f}' x2='{x(0):.1f}' y1='32' y2='{height - 38}' class='zero' />")
        parts += [
            f"<text x='{x(tick):.1f}' y='{height - 24}' class='tick' text-anchor='middle'>{tick:+d}</text>"
            for tick in range(int(low // 10) * 10, int(high) + 1, 10)
            if tick >= low
        ]
        for i, name in enumerate(study):
            y = 32 + row * (i + 0.5)
            values = gains[name, family]
            parts += [f"<circle cx='{x(value):.1f}' cy='{y:.1f}' r='3' />" for value in values]
            mean = x(float(np.mean(values)))
            parts.append(f"<line x1='{mean:.1f}' x2='{mean:.1f}' y1='{y - 7:.1f}' y2='{y + 7:.1f}' class='mean' />")
    parts += [f"<text x='8' y='{32 + row * (i + 0.5) + 4:.1f}'>{name}</text>" for i, name in enumerate(study)]
    parts.append(
        f"<text x='8' y='{height - 6}'>points above untrained CLIP top-k; a dot is a run, a bar their mean</text>"
    )
    return _svg(left + len(families) * (width + 20), height, parts)


def curves_figure(study: Mapping[str, Mapping[int, Outcome]], columns: int = 4) -> str:
    """SVG: of each variant a small chart of its runs' training accuracy, the paper's mean behind them."""
    width, height, gap = 200, 120, 30
    every = [run for runs in study.values() for run in runs.values()]
    last = max(run.questions[-1] for run in every)
    low, high = min(run.curve.min() for run in every), max(run.curve.max() for run in every)
    paper = list(study["paper"].values())
    grid = np.linspace(0, last, 60)
    mean = np.mean([np.interp(grid, run.questions, run.curve) for run in paper], axis=0)
    parts = []
    for i, (name, runs) in enumerate(study.items()):
        left, top = 40 + (i % columns) * (width + gap), 24 + (i // columns) * (height + gap)

        def points(xs, ys, left=left, top=top):
            places = zip(xs, ys, strict=True)
            return " ".join(
                f"{left + width * a / last:.1f},{top + height * (high - b) / max(high - low, 1e-9):.1f}"
                for a, b in places
            )

        parts.append(f"<text x='{left}' y='{top - 6}' class='head'>{name}</text>")
        parts.append(f"<rect x='{left}' y='{top}' width='{width}' height='{height}' class='frame' />")
        parts.append(f"<polyline points='{points(grid, mean)}' class='paper' />")
        parts += [f"<polyline points='{points(run.questions, run.curve)}' class='run' />" for run in runs.values()]
        if i % columns == 0:
            parts.append(f"<text x='{left - 6}' y='{top + 8}' class='tick' text-anchor='end'>{high:.0f}</text>")
            parts.append(f"<text x='{left - 6}' y='{top + height}' class='tick' text-anchor='end'>{low:.0f}</text>")
    rows = -(-len(study) // columns)
    parts.append(
        f"<text x='40' y='{24 + rows * (height + gap) + 4}'>training accuracy (%) over {last:.0f} questions; each run, "
        "and grey the paper's mean</text>"
    )
    return _svg(40 + columns * (width + gap), 24 + rows * (height + gap) + 16, parts)


def _svg(width: float, height: float, parts: Sequence[str]) -> str:
    style = (
        "text{font:12px sans-serif;fill:#222}.head{font-weight:600}.tick{font-size:10px;fill:#666}"
        ".zero{stroke:#999;stroke-dasharray:3 3}.mean{stroke:#1f5fbf;stroke-width:2.5}circle{fill:#1f5fbf;opacity:.45}"
        "polyline{fill:none}.run{stroke:#1f5fbf;stroke-width:1.2}.paper{stroke:#bbb;stroke-width:3}"
        ".frame{fill:none;stroke:#ddd}"
    )
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width:.0f} {height:.0f}' width='{width:.0f}'>"
        f"<style>{style}</style><rect width='100%' height='100%' fill='#fff' />{''.join(parts)}</svg>\n"
    )


def write(folder: Path, output: Path) -> None:
    """Writes the document and its figures. Raises ValueError where the paper's recipe was not run."""
    study = read_study(folder)
    if "paper" not in study:
        raise ValueError(f"{folder}: no run of the paper's recipe is done; start with run --variants=paper")
    untrained = read_accuracy(folder / UNTRAINED / "evaluation.json")
    figures = output.parent / "ablations"
    figures.mkdir(parents=True, exist_ok=True)
    findings = output.read_text().partition(MARK)[0] if output.is_file() else "# Ablations on the toy world\n\n"
    output.write_text(f"{findings}{MARK}\n{document(study, untrained)}")
    (figures / "gains.svg").write_text(gains_figure(study, untrained))
    (figures / "curves.svg").write_text(curves_figure(study))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("run", "write"))
    parser.add_argument("--folder", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--data", type=Path, default=Path("toy_data"), help="Folder of the training videos.")
    parser.add_argument("--held_out", type=Path, default=Path("toy_held_out"), help="Folder of the evaluation videos.")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--num_steps", type=int, default=300)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "ablations.md")
    args = parser.parse_args()
    variants = args.variants.split(",")
    if unknown := [name for name in variants if name not in VARIANTS]:
        parser.error(f"--variants: {unknown[0]!r} is not one of {', '.join(VARIANTS)}")
    try:
        if args.task == "write":
            write(args.folder, args.output)
        else:
            seeds = [int(seed) for seed in args.seeds.split(",")]
            fields = {"num_steps": args.num_steps, "optimizer.learning_rate": args.learning_rate}
            folders = (path.absolute() for path in (args.folder, args.data, args.held_out))
            run(*folders, variants, seeds, fields)
    except (ValueError, OSError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
