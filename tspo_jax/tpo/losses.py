"""What a pair of answers is worth: the losses of TPO's trainer (arXiv 2501.13919) on log-probabilities of answers.

With pairs i = 1..B and lp the log-probability of an answer under the policy, ref under the reference:

    h = (lp_chosen - lp_rejected) - (ref_chosen - ref_rejected)
    loss = alpha * mean(preference loss of h) + gamma * mean over tokens(-log p of the chosen answers' tokens)

The second mean is over all tokens of the chosen answers of the whole batch, so that it is the same however the batch is
cut into parts; the original's is over the part that a device holds.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from tspo_jax.models.packed_answers import log_probs_at

IGNORED = -100  # label of a token that does not count

# ipo compares means per token, the others sums over the answer.
LOSS_TYPES = ("sigmoid", "hinge", "ipo", "kto_pair", "robust")
SMOOTHED = ("sigmoid", "robust")  # those in which label_smoothing counts


class Objective(NamedTuple):
    """The loss: `loss_type` of LOSS_TYPES; beta, the inverse temperature; label_smoothing, the share of pairs that are
    taken to be the wrong way round; alpha, weight of the preference loss; gamma, weight of the likelihood of the chosen
    answers (the paper's alpha)."""

    loss_type: str = "sigmoid"
    beta: float = 0.2
    label_smoothing: float = 0.0
    alpha: float = 1.0
    gamma: float = 1.0

    def check(self) -> "Objective":
        """Raises ValueError naming the field that has no meaning."""
        if self.loss_type not in LOSS_TYPES:
            raise ValueError(f"loss_type is {self.loss_type!r}, not one of {', '.join(LOSS_TYPES)}")
        if not self.beta > 0:
            raise ValueError(f"beta is {self.beta}; it must be more than 0")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing is {self.label_smoothing}; it must be from 0 to below 0.5")
        if self.label_smoothing and self.loss_type not in SMOOTHED:
            raise ValueError(
                f"label_smoothing is {self.label_smoothing}, but loss_type {self.loss_type} has none; "
                f"it counts in {' and '.join(SMOOTHED)}"
            )
        if self.alpha < 0 or self.gamma < 0 or not self.alpha + self.gamma > 0:
            raise ValueError(f"alpha is {self.alpha} and gamma {self.gamma}: at least one must be more than 0")
        return self

    @property
    def couples_pairs(self) -> bool:
        """Whether the loss of a pair depends on the other pairs of its batch."""
        return self.loss_type == "kto_pair"


class AnswerLogProbs(NamedTuple):
    """Log-probabilities of answers, float32 [...]: summed over the tokens that count; `tokens` is their number."""

    total: jax.Array
    tokens: jax.Array

    @property
    def mean(self) -> jax.Array:
        """Per token; 0 for an answer without tokens."""
        return self.total / jnp.maximum(self.tokens, 1)

    def of(self, objective: Objective) -> jax.Array:
        """What the loss compares."""
        return self.mean if objective.loss_type == "ipo" else self.total


def label_log_probs(logits: jax.Array, labels: jax.Array) -> AnswerLogProbs:
    """Log-probabilities of the labels under logits of whole sequences.

    Args:
      logits: float [..., N, V].
      labels: int [..., N], not shifted: the label at position t is predicted at t - 1. IGNORED = does not count; a
        label at position 0 never does.
    """
    labels = labels[..., 1:]
    counts = labels != IGNORED
    log_probs = log_probs_at(logits[..., :-1, :], jnp.where(counts, labels, 0))
    return AnswerLogProbs(jnp.where(counts, log_probs, 0).sum(-1), counts.sum(-1))


def preference_losses(
    objective: Objective, policy: jax.Array, reference: jax.Array, weights: jax.Array | None = None
) -> jax.Array:
    """The loss of every pair, float32 [B]; for kto_pair [2B], of the chosen answers and then of the rejected ones.

    Args:
      policy, reference: log-probabilities float32 [B, 2] of the chosen and the rejected answer (AnswerLogProbs.of).
      weights: float [B], 0 for rows that fill a batch up: they do not count in kto_pair's means over the batch. Those
        means carry gradient, as in the original.
    """
    beta, eps = objective.beta, objective.label_smoothing
    ratio = policy - reference
    h = ratio[:, 0] - ratio[:, 1]
    if objective.loss_type == "sigmoid":
        return -(1 - eps) * jax.nn.log_sigmoid(beta * h) - eps * jax.nn.log_sigmoid(-beta * h)
    if objective.loss_type == "robust":
        signed = -(1 - eps) * jax.nn.log_sigmoid(beta * h) + eps * jax.nn.log_sigmoid(-beta * h)
        return signed / (1 - 2 * eps)
    if objective.loss_type == "hinge":
        return jax.nn.relu(1 - beta * h)
    if objective.loss_type == "ipo":
        return (h - 1 / (2 * beta)) ** 2
    if objective.loss_type == "kto_pair":
        divergence = jnp.maximum(weighted_mean(ratio, weights), 0)
        of_chosen = 1 - jax.nn.sigmoid(beta * (ratio[:, 0] - divergence[1]))
        of_rejected = 1 - jax.nn.sigmoid(beta * (divergence[0] - ratio[:, 1]))
        return jnp.concatenate([of_chosen, of_rejected])
    raise ValueError(f"loss_type is {objective.loss_type!r}, not one of {', '.join(LOSS_TYPES)}")


def weighted_mean(values: jax.Array, weights: jax.Array | None) -> jax.Array:
    """The mean of values [B, ...] over the first axis, by weights [B]."""
    if weights is None:
        return values.mean(0)
    return jnp.tensordot(weights, values, axes=1) / jnp.maximum(weights.sum(), 1e-9)


def rewards(objective: Objective, policy: jax.Array, reference: jax.Array) -> jax.Array:
    """Implicit rewards beta (lp - ref) of the chosen and the rejected answers, float32 [B, 2], without gradient."""
    return objective.beta * jax.lax.stop_gradient(policy - reference)


def total_loss(
    objective: Objective,
    policy: AnswerLogProbs,
    reference: AnswerLogProbs,
    weights: jax.Array | None = None,
    num_pairs: jax.Array | float | None = None,
    num_tokens: jax.Array | float | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss of a batch, or its share of the loss of a larger one.

    Args:
      policy, reference: [B, 2], chosen and rejected.
      weights: float [B], see `preference_losses`.
      num_pairs, num_tokens: pairs, and tokens of chosen answers, in the whole batch that this is a part of; by default
        those of this one. Only where the loss does not couple the pairs.
    Returns:
      the loss, and `losses/dpo` and `losses/sft`, which it is the weighted sum of.
    """
    compared = policy.of(objective), reference.of(objective)
    losses = preference_losses(objective, *compared, weights)
    weights = jnp.ones(len(policy.total)) if weights is None else weights
    copies = len(losses) // len(weights)
    num_pairs = weights.sum() if num_pairs is None else num_pairs
    num_tokens = (weights * policy.tokens[:, 0]).sum() if num_tokens is None else num_tokens
    dpo = jnp.dot(jnp.tile(weights, copies), losses) / (copies * jnp.maximum(num_pairs, 1e-9))
    sft = -jnp.dot(weights, policy.total[:, 0]) / jnp.maximum(num_tokens, 1)
    return objective.alpha * dpo + objective.gamma * sft, {"losses/dpo": dpo, "losses/sft": sft}


def pair_metrics(
    objective: Objective, policy: AnswerLogProbs, reference: AnswerLogProbs, weights: jax.Array
) -> dict[str, jax.Array]:
    """Means over a batch's pairs, under the names that TRL gives them; `policy` and `reference` are [B, 2].

    `rewards/accuracies` is the share of pairs whose chosen answer has the strictly larger reward: 0 where the policy is
    the reference. `rewards/margin_per_token` divides each reward by its answer's length before the difference.
    """
    of_answers = rewards(objective, policy.of(objective), reference.of(objective))
    margin = of_answers[:, 0] - of_answers[:, 1]
    per_token = rewards(objective, policy.mean, reference.mean)
    rows = {
        "rewards/chosen": of_answers[:, 0],
        "rewards/rejected": of_answers[:, 1],
        "rewards/margins": margin,
        "rewards/accuracies": (margin > 0).astype(jnp.float32),
        "rewards/margin_per_token": per_token[:, 0] - per_token[:, 1],
        "logps/chosen": policy.total[:, 0],
        "logps/rejected": policy.total[:, 1],
        "ref_logps/chosen": reference.total[:, 0],
        "ref_logps/rejected": reference.total[:, 1],
        "tokens/chosen": policy.tokens[:, 0].astype(jnp.float32),
        "tokens/rejected": policy.tokens[:, 1].astype(jnp.float32),
    }
    return {name: weighted_mean(jax.lax.stop_gradient(values), weights) for name, values in rows.items()}
