"""Rules that say in words, with numbers, what is wrong with a run of preference training: one rule an illness."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from tspo_jax.runs.finding import Finding

LOG_2 = math.log(2)
MIN_STEPS = 3
QUICK = 0.1  # share of the run in which pairs should not be told apart already


class Log:
    """The rows of a run's steps and of its evaluations, and its config."""

    def __init__(self, rows: Sequence[Mapping], config: Mapping):
        self.steps = [row for row in rows if "loss" in row]
        self.evaluations = [row for row in rows if "eval_loss" in row]
        self.config = config
        self.edge = max(MIN_STEPS, len(self.steps) // 5)  # rows that are the end of the run

    def values(self, name: str, last: int = 0) -> np.ndarray:
        """A metric of every step (of the `last` ones); nan where it was not finite."""
        return np.array([math.nan if row[name] is None else row[name] for row in self.steps[-last:]], float)

    def late(self, name: str) -> float:
        return float(np.mean(self.values(name, self.edge)))


def chosen_less_likely(log: Log) -> Iterator[Finding]:
    fallen = log.late("ref_logps/chosen") - log.late("logps/chosen")
    per_token = fallen / max(log.late("tokens/chosen"), 1)
    if log.late("rewards/margins") > 0 and per_token > 0.05:
        gamma = log.config["preference"]["gamma"]
        yield Finding(
            "chosen_less_likely",
            f"The margin is {log.late('rewards/margins'):.3f}, but the chosen answers have become less likely than "
            f"under the reference, by {per_token:.2f} nats a token: the rejected ones only fall faster. Plain DPO does "
            "that; the likelihood of the chosen answers holds against it: raise preference.gamma (it is "
            f"{gamma:g}) or beta.",
            {"nats_per_token": per_token, "margin": log.late("rewards/margins")},
        )


def loss_stays(log: Log) -> Iterator[Finding]:
    learning = log.steps[2:]  # the first update has rate 0
    preference = log.config["preference"]
    if len(learning) < MIN_STEPS or preference["loss_type"] not in ("sigmoid", "robust") or not preference["alpha"]:
        return
    furthest = max(abs(row["losses/dpo"] - LOG_2) for row in learning)
    if furthest < 1e-4:
        highest = max(row["learning_rate"] for row in log.steps)
        yield Finding(
            "loss_stays",
            f"The preference loss stays at log 2 = {LOG_2:.3f} (by {furthest:.1e} at most): the policy does not leave "
            f"the reference. The highest learning rate was {highest:g}, the mean answers have "
            f"{log.late('tokens/chosen'):.1f} and {log.late('tokens/rejected'):.1f} tokens. Raise the rate, or look "
            "whether the answers differ where they count.",
            {"furthest": furthest, "highest_rate": highest},
        )


def wrong_reference(log: Log) -> Iterator[Finding]:
    first = log.steps[0]
    if first["step"] != 1:
        return
    beta = log.config["preference"]["beta"]
    names = "chosen", "rejected"
    apart = max(abs(first[f"rewards/{name}"]) / beta / max(first[f"tokens/{name}"], 1) for name in names)
    if apart > 0.05:
        yield Finding(
            "wrong_reference",
            f"At the first step the log-probabilities differ from the reference's by {apart:.2f} nats a token; they "
            "must be equal. The reference is of other weights, frames, prompts or another dtype: remove "
            "reference.file.",
            {"nats_per_token": apart},
        )


def told_apart_at_once(log: Log) -> Iterator[Finding]:
    right = log.values("rewards/accuracies")
    quick = max(MIN_STEPS, math.ceil(QUICK * log.config["num_steps"]))
    perfect = np.flatnonzero(right >= 1.0)
    held_out = [row["eval_rewards/accuracies"] for row in log.evaluations]
    if not len(perfect) or perfect[0] >= quick or len(right) <= quick or np.mean(right[quick:]) < 0.99:
        return
    if held_out and max(held_out) > 0.7:
        return
    chosen, rejected = log.late("tokens/chosen"), log.late("tokens/rejected")
    of_held_out = f"held-out pairs {max(held_out):.0%} at best" if held_out else "no held-out pairs were looked at"
    yield Finding(
        "told_apart_at_once",
        f"All pairs are ranked right from step {log.steps[perfect[0]]['step']} on ({of_held_out}): they can be told "
        f"apart by something else than what the video shows. The chosen answers have {chosen:.1f} tokens and the "
        f'rejected {rejected:.1f}; look for lengths, or phrases such as "the video does not show".',
        {"first_step": float(log.steps[perfect[0]]["step"]), "tokens_chosen": chosen, "tokens_rejected": rejected},
    )


def longer_is_better(log: Log) -> Iterator[Finding]:
    per_token, margin = log.late("rewards/margin_per_token"), log.late("rewards/margins")
    chosen, rejected = log.late("tokens/chosen"), log.late("tokens/rejected")
    if margin > 0 >= per_token and chosen > 1.2 * rejected:
        yield Finding(
            "longer_is_better",
            f"The margin is {margin:.3f}, but {per_token:.4f} a token: the chosen answers ({chosen:.1f} tokens) only "
            f"win over the rejected ones ({rejected:.1f}) by their length. Make pairs of equal length, or take "
            "loss_type ipo.",
            {"margin": margin, "margin_per_token": per_token},
        )


def not_finite(log: Log) -> Iterator[Finding]:
    broken = [row["step"] for row in log.steps if row["loss"] is None or not math.isfinite(row["loss"])]
    if broken:
        yield Finding(
            "not_finite",
            f"The loss is not finite from step {broken[0]} on: an answer without tokens, or too high a learning rate.",
            {"step": float(broken[0])},
        )


RULES: tuple[Callable[[Log], Iterator[Finding]], ...] = (
    not_finite,
    wrong_reference,
    loss_stays,
    chosen_less_likely,
    told_apart_at_once,
    longer_is_better,
)


def diagnose(rows: Sequence[Mapping], config: Mapping) -> list[Finding]:
    """The findings of all rules about a run's rows of metrics. Raises ValueError for a run without enough steps."""
    log = Log(rows, config)
    if len(log.steps) < MIN_STEPS:
        raise ValueError(f"{len(log.steps)} steps of preference training say nothing; at least {MIN_STEPS} are needed")
    return [finding for rule in RULES for finding in rule(log)]
