"""Rule-based rewards of a group of answers and frame sets (host side; TSPO, arXiv 2508.04369)."""

from collections.abc import Mapping, Sequence

import numpy as np

from tspo_jax.data.letters import LETTERS, option_letter, solution_letter

# Which rewards count for which kind of sample, and how much. The original adds a constant 1 to `general`
# samples; advantages are centred within a group, so it has no effect and is left out.
PAPER_WEIGHTS = {"general": {"accuracy": 1.0}, "specific": {"accuracy": 1.0, "location": 1.0}}

OPTION_REWARDS = ("probability", "margin")  # those that need to know how likely each option is


def accuracy(completion: str, solution: str, num_options: int = 0) -> float:
    """1.0 where the answer names the option of the solution, else 0.0.

    An answer without a letter is never correct; the original counts it as correct where the solution has none either.
    """
    letter = option_letter(completion, num_options)
    return float(letter is not None and letter == solution_letter(solution, num_options))


def temporal_location(picks: np.ndarray, needle_mask: np.ndarray) -> np.ndarray:
    """Share of the picked frames that lie in the target video: picks [G,K], bool [T] -> float32 [G]."""
    return np.asarray(needle_mask)[np.asarray(picks)].mean(axis=-1, dtype=np.float32)


def coverage(picks: np.ndarray, num_frames: int) -> np.ndarray:
    """Share of K equal parts of the video that hold a picked frame: picks [G,K] -> float32 [G], 1 where all do."""
    picks = np.asarray(picks)
    parts = np.sort(picks * picks.shape[-1] // num_frames, axis=-1)
    return (1 + (np.diff(parts, axis=-1) > 0).sum(-1)).astype(np.float32) / np.float32(picks.shape[-1])


def right_option(option_log_probs: np.ndarray, solution: str, margin: bool = False) -> np.ndarray:
    """Soft form of `accuracy`: how much the MLLM leans towards the right option, graded where all answers are wrong.

    Args:
      option_log_probs: float [G,O], log-probabilities of the O options.
      margin: return log p(right) - max log p(wrong) instead of p(right).

    Returns: float32 [G].
    """
    right = LETTERS.index(solution_letter(solution, option_log_probs.shape[1]))
    if not margin:
        return np.exp(option_log_probs[:, right]).astype(np.float32)
    wrong = np.delete(option_log_probs, right, axis=1).max(axis=1)
    return (option_log_probs[:, right] - wrong).astype(np.float32)


def group_rewards(
    kind: str,
    completions: Sequence[Sequence[str]],
    solutions: Sequence[str],
    picks: np.ndarray,
    needle_mask: np.ndarray | None,
    weights: Mapping[str, Mapping[str, float]] = PAPER_WEIGHTS,
    num_frames: np.ndarray | None = None,
    option_log_probs: np.ndarray | None = None,
    num_options: Sequence[int] | None = None,
) -> dict[str, np.ndarray]:
    """Rewards of a batch of one kind.

    Args:
      kind: `general` or `specific`.
      completions: [B][G] answers of the MLLM.
      solutions: [B].
      picks: int [B,G,K].
      needle_mask: bool [B,T], True on frames of the target video; unused where location does not count.
      weights: kind -> reward name -> weight; names: accuracy, location, coverage, probability, margin.
      num_frames: int [B], candidate frames of the question; for coverage.
      option_log_probs: float [B,G,O]; for probability and margin.
      num_options: int [B], of the questions; None = at most five each, the original's rule.

    Returns: float32 [B,G] of each reward that counts for this kind, and of `total`, their weighted sum.

    Raises: ValueError for an unknown kind or reward.
    """
    if kind not in weights:
        raise ValueError(f"kind is {kind!r}, not one of {', '.join(weights)}")
    counts = num_options or [0] * len(solutions)
    rules = {
        "accuracy": lambda b: [accuracy(completion, solutions[b], counts[b]) for completion in completions[b]],
        "location": lambda b: temporal_location(picks[b], needle_mask[b]),
        "coverage": lambda b: coverage(picks[b], num_frames[b]),
        "probability": lambda b: right_option(option_log_probs[b], solutions[b]),
        "margin": lambda b: right_option(option_log_probs[b], solutions[b], margin=True),
    }
    if unknown := weights[kind].keys() - rules:
        raise ValueError(f"weights.{kind} names {min(unknown)!r}, not one of {', '.join(rules)}")
    batch = range(len(solutions))
    rewards = {name: np.array([rules[name](b) for b in batch], np.float32) for name in weights[kind]}
    total = sum(np.float32(weight) * rewards[name] for name, weight in weights[kind].items())
    return {**rewards, "total": total}
