"""What a run's report says: the run, how training went, what it gained and what it looks like, from the run's files.

`write_report` reads a run folder with its evaluation; `write_page` is given what it says, as during training.
"""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from tspo_jax import config as config_module
from tspo_jax.checkpoints.folders import load_agent, load_clip
from tspo_jax.config import Config
from tspo_jax.data.frame_store import FrameStore
from tspo_jax.evaluation import results
from tspo_jax.evaluation import run as evaluate
from tspo_jax.evaluation.benchmarks import Item
from tspo_jax.evaluation.results import ALL, INDEX_FILE
from tspo_jax.pages import report_page
from tspo_jax.pages.charts import Curve
from tspo_jax.pages.report_page import Choice, Example
from tspo_jax.runs import run_folder
from tspo_jax.runs.metrics import read_rows
from tspo_jax.selection import methods
from tspo_jax.selection.scoring import Scorer

NAMES = {
    "uniform": "uniform",
    "clip-topk": "CLIP top-k, untrained",
    "topk": "trained agent, top-k",
    "bin-max": "trained agent, bin-max",
    "aks": "trained agent, AKS",
    methods.SPAN: "trained agent, its span",
    methods.SEARCH: "T*, search by a detector",
    INDEX_FILE: "index file",
    results.PLAIN: "captions, one answer",
    results.CLOSER: "captions, closer looks",
}  # method -> name for the reader
SHOWN = ("uniform", "clip-topk", "topk")
NUM_EXAMPLES = 6
HELD_OUT = "held_out/"  # metrics of a method
CURVES = {
    "Accuracy on held-out questions": {
        f"{HELD_OUT}topk": "trained agent",
        f"{HELD_OUT}clip-topk": "CLIP top-k, untrained",
    },
    "Accuracy reward": {"accuracy/general": "general", "accuracy/specific": "needle"},
    "Temporal location reward": {"location/specific": "needle"},
    "Entropy of the scores (nats)": {"score_entropy": ""},
    "Dead groups (share)": {"dead_groups": ""},
    "Gradient norm, before clipping": {"grad_norm": ""},
}  # chart -> metric -> its name in the legend


def write_report(run_dir: str | Path) -> Path:
    """Writes RUN_DIR/report.html and returns its path.

    Raises ValueError or OSError naming what is missing.
    """
    run_dir = Path(run_dir)
    folder = run_dir / evaluate.FOLDER
    if not (folder / "summary.json").is_file():
        raise ValueError(f"{folder} holds no evaluation; run python -m tspo_jax.evaluate --run_dir={run_dir} first")
    evaluated = run_folder.read_run_config(folder)
    config = config_module.read(evaluated["config"])
    try:
        summary = json.loads((folder / "summary.json").read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{folder / 'summary.json'}: not valid json ({error}); evaluate again") from None
    rows = results.read_rows(folder / "rows.jsonl")
    metrics = read_rows(run_dir / "metrics.jsonl") if (run_dir / "metrics.jsonl").is_file() else []
    clip = load_clip(config.agent.clip, config.agent.clip_dtype)
    store = FrameStore(config.evaluation.store or config.data.store, clip.identity)
    shape = {"window": config.agent.window, "num_heads": config.agent.num_heads}
    untrained = Scorer(clip, load_agent(config.agent.init or config.agent.clip, seed=config.seed, **shape))
    agent_folder = evaluated["agent_folder"] or run_dir
    agent = evaluate.read_agent(config, agent_folder)
    if evaluate.parameters_sha256(agent[1]) != evaluated["agent"]["parameters_sha256"]:
        raise ValueError(
            f"{agent_folder} holds another agent than was evaluated in {folder}; evaluate it with another --run_dir"
        )
    trained = Scorer(clip, agent)

    def scores_of(item: Item) -> tuple[np.ndarray, np.ndarray]:
        features, text = store.features(item.video), clip.text_features([item.query], batch_size=1)[0]
        return untrained(features, text)[1], trained(features, text)[1]

    return write_page(run_dir, config, summary, rows, metrics, evaluate.read_items(config), store, scores_of)


def write_page(
    run_dir: Path,
    config: Config,
    summary: dict,
    rows: Sequence[dict],
    metrics: Sequence[dict],
    items: Sequence[Item],
    store: FrameStore,
    scores_of: Callable[[Item], tuple[np.ndarray, np.ndarray]],
) -> Path:
    """Writes RUN_DIR/report.html, whole or not at all.

    Args:
      summary, rows: of the evaluation (evaluation/results.py).
      metrics: rows of metrics.jsonl.
      items: the questions that were asked, about videos of `store`.
      scores_of: a question's candidates [T] as scored before and after training.
    """
    html = report_page.page(
        title=f"Run {run_dir.resolve().name}",
        facts=facts(config, metrics),
        curves=curves(metrics),
        summary=summary,
        names=names_of(summary),
        examples=examples(config, items, rows, store, scores_of),
    )
    path = run_dir / "report.html"
    partial = path.with_suffix(".tmp")
    partial.write_text(html, encoding="utf-8")
    partial.replace(path)
    return path


def names_of(summary: dict) -> dict[str, str]:
    """Method -> name for the reader, with those of the agents of other runs (evaluation/beside.py) at the end."""
    return NAMES | {name: NAMES[of] + name.removeprefix(of) for name, of in summary.get("beside", {}).items()}


def facts(config: Config, metrics: Sequence[dict]) -> dict[str, str]:
    """What was run, for the head of the page."""
    found = {
        "Agent trained on": Path(config.data.questions).name if metrics else "not trained here",
        "Evaluated on": Path(config.evaluation.questions).name,
        "Answering model (frozen)": Path(config.answerer.folder).name,
        "CLIP (frozen)": Path(config.agent.clip).name,
        "Attention window": f"{config.agent.window} frames",
        "Seed": str(config.seed),
    }
    if not metrics:
        return found
    found |= {
        "Steps": f"{metrics[-1]['step']} of {config.num_steps}",
        "Questions per step": str(config.batch_size),
        "Group": f"{config.policy.group_size} frame sets of {config.data.general.k} (needle: {config.data.specific.k})",
        "Learning rate": f"{config.optimizer.learning_rate:g} → 0",
        "Temperature": f"{config.policy.tau_start:g} → {config.policy.tau_end:g}",
    }
    seconds = sum(value for row in metrics for name, value in row.items() if name.startswith("seconds/") and value)
    found |= {"Training time": f"{seconds / 60:.1f} min"} if seconds else {}
    idle = [row["device_idle"] for row in metrics[len(metrics) // 2 :] if _is_number(row.get("device_idle"))]
    return found | ({"Device waits for the host": f"{np.median(idle):.0%} of the time"} if idle else {})


def curves(metrics: Sequence[dict]) -> dict[str, list[Curve]]:
    """The charts of metrics.jsonl; a metric that no step has, or that is always the same, is left out."""
    charts = {}
    for title, wanted in CURVES.items():
        lines = []
        for (metric, name), colour in zip(wanted.items(), ("first", "second"), strict=False):
            points = [(row["step"], row[metric]) for row in metrics if _is_number(row.get(metric))]
            if points:
                colour = metric.removeprefix(HELD_OUT) if metric.startswith(HELD_OUT) else colour
                lines.append(Curve(name or title, colour, *zip(*points, strict=True)))
        if lines:
            charts[title] = lines
    return charts


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def examples(
    config: Config,
    items: Sequence[Item],
    rows: Sequence[dict],
    store: FrameStore,
    scores_of: Callable[[Item], tuple[np.ndarray, np.ndarray]],
) -> list[Example]:
    """Held-out questions with the scores of the agent before and after training, at the smallest budget."""
    k = min(config.evaluation.budgets)
    methods = [method for method in SHOWN if method in config.evaluation.methods]
    answered = {(row["id"], row["method"]): row for row in rows if row["k"] == k}
    items = [item for item in items if methods and all((item.id, method) in answered for method in methods)]
    found = []
    for family, item in spread_out(items, NUM_EXAMPLES):
        video = store.video(item.video)
        choices = []
        for method in methods:
            row = answered[item.id, method]
            frames = list(store.frames(item.video, row["candidate_idx"]))
            choices.append(Choice(NAMES[method], method, row["timestamps"], frames, row["answer"], row["correct"]))
        found.append(
            Example(
                family,
                item.query,
                item.options,
                item.answer,
                item.video,
                video.num_video_frames / video.fps,
                item.moments,
                video.timestamps,
                *scores_of(item),
                choices,
            )
        )
    return found


def spread_out(items: Sequence[Item], num: int) -> list[tuple[str, Item]]:
    """About `num` questions as (family, question): equally many of each label of the first grouping, evenly spaced in
    the file."""
    families: dict[str, list[Item]] = {}
    for item in items:
        label = next((labels[0] for labels in item.groups.values()), ALL)
        families.setdefault(label, []).append(item)
    chosen = []
    for family, members in sorted(families.items())[:num]:
        each = min(len(members), max(1, num // len(families)))
        places = np.linspace(0, len(members), each, endpoint=False, dtype=int)
        chosen += [(family, members[place]) for place in places]
    return chosen
