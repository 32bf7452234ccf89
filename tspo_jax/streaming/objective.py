"""Losses of the streaming encoder: of the answer, and of the picked clips where the evidence is known."""

import dataclasses

import jax
import jax.numpy as jnp
import optax


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The second stage: with the selection loss first, then mostly by the answer. Raises ValueError for no schedule.

    Attributes:
      steps: optimiser steps.
      labelled_steps: of them, first ones with the selection loss at weight 1.
      kept: its weight after that. 0 loses the selection where straight-through gradients are noisy (docs/streaming.md).
    """

    steps: int
    labelled_steps: int
    kept: float = 0.1

    def __post_init__(self):
        if not 0 <= self.labelled_steps <= self.steps:
            raise ValueError(f"labelled_steps is {self.labelled_steps}, not between 0 and the {self.steps} steps")
        if not 0 <= self.kept <= 1:
            raise ValueError(f"the weight of the selection loss that is kept is {self.kept}, not between 0 and 1")

    def weight(self, step: jax.Array | int) -> jax.Array:
        """Of the selection loss at a step."""
        return jnp.where(jnp.asarray(step) < self.labelled_steps, 1.0, self.kept)


def selection_loss(scores: jax.Array, evidence: jax.Array) -> jax.Array:
    """Cross-entropy of softmax(scores) with the clips that hold the evidence (VideoStreaming's temporal warm-up).

    Args:
      scores: [B, K], -inf where there is no clip.
      evidence: bool [B, K]; a question without any does not count.

    Returns: the mean over the questions that have some; 0 where none has.
    """
    log_probs = jnp.where(evidence, jax.nn.log_softmax(scores), 0.0)
    number = evidence.sum(-1)
    return -jnp.sum(log_probs.sum(-1) / jnp.maximum(number, 1)) / jnp.maximum(jnp.sum(number > 0), 1)


def answer_loss(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean cross-entropy of the answers' tokens: logits [B, A, V] at the places before them, targets int [B, A], -1
    where no token counts."""
    counts = targets >= 0
    losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), jnp.maximum(targets, 0))
    return jnp.sum(losses * counts) / jnp.maximum(counts.sum(), 1)


def found_evidence(picks: jax.Array, evidence: jax.Array) -> jax.Array:
    """Share of the questions with evidence of which a clip with some was picked: picks int [B, V], evidence [B, K]."""
    hit = jnp.take_along_axis(evidence, picks.clip(0, evidence.shape[1] - 1), axis=1) & (picks < evidence.shape[1])
    has_some = evidence.any(-1)
    return jnp.sum(hit.any(-1) & has_some) / jnp.maximum(has_some.sum(), 1)
