"""What the metrics of a step of TSPO are called in the log, and which of them stand on the terminal (see train.py)."""

from collections.abc import Mapping

import jax

from tspo_jax.runs.training_log import Evaluated

PARTS = ("data", "sample", "fetch", "answer", "reward", "update")
COLUMNS = {  # of the table on the terminal: metric -> heading
    "step": "step",
    "reward/general": "general",
    "reward/specific": "specific",
    "location/specific": "location",
    "dead_groups": "dead",
    "unparsed": "unparsed",
    "score_entropy": "entropy",
    "grad_norm": "gradient",
    "tau": "tau",
    **{f"seconds/{part}": part for part in PARTS},
    "device_idle": "idle",
    "compilations": "programs",
}
REWARD_NAMES = {"total": "reward"} | {  # of rewards.group_rewards -> metric
    name: name for name in ("accuracy", "location", "coverage", "probability", "margin")
}


def of_kind(kind: str, metrics: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Metrics of an update on samples of one kind: rewards first, and named by it."""
    rewards = {f"{REWARD_NAMES[name]}/{kind}": metrics[name] for name in REWARD_NAMES if name in metrics}
    return rewards | {name: value for name, value in metrics.items() if name not in REWARD_NAMES}


def held_out(step: int, accuracy: Mapping[str, float], main: str) -> Evaluated:
    """Accuracy of each method on held-out questions after `step` updates; that of method `main` is the score."""
    found = ", ".join(f"{method} {100 * value:.1f} %" for method, value in accuracy.items())
    metrics = {f"held_out/{method}": value for method, value in accuracy.items()}
    return Evaluated(metrics, f"right in held-out questions after step {step}: {found}", accuracy[main])
