"""The policy over frame sets: sampling, log-probabilities, advantages, loss and the update of the agent.

    logits [B,T] --gumbel_top_k--> picks [B,G,K] --(answers, rewards.py)--> rewards [B,G]
    logits, picks, rewards --loss--> scalar, metrics        update: one optimiser step on it

Everything here is pure, float32 and may be compiled; a frame that is only padding has the logit -inf. What is
optimised is named by `Objective`, whose defaults are the paper's (TSPO, arXiv 2508.04369).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tspo_jax.models.gumbel_top_k import gumbel_noise, perturbed_top_k

Params = Any
Metrics = dict[str, jax.Array]


# ---- schedules -------------------------------------------------------------------------------------------


def temperature(step, num_steps: int, start: float = 0.025, end: float = 0.01) -> jax.Array:
    """tau of the scores at an optimiser step: linear from `start` to `end` over `num_steps`."""
    return jnp.asarray(optax.linear_schedule(start, end, num_steps)(step), jnp.float32)


def learning_rate(step, num_steps: int, peak: float = 5e-4) -> jax.Array:
    """Learning rate at an optimiser step: linear from `peak` to 0, no warm-up."""
    return jnp.asarray(optax.linear_schedule(peak, 0.0, num_steps)(step), jnp.float32)


def make_optimizer(
    num_steps: int,
    peak_learning_rate: float = 5e-4,
    max_grad_norm: float = 1.0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW with `learning_rate`: what the original's trainer has in effect."""
    return optax.chain(
        optax.clip_by_global_norm(max_grad_norm),
        optax.adamw(
            lambda step: learning_rate(step, num_steps, peak_learning_rate),
            b1=b1,
            b2=b2,
            eps=eps,
            weight_decay=weight_decay,
        ),
    )


# ---- sampling --------------------------------------------------------------------------------------------


def question_keys(seed, step, index: jax.Array, copy: jax.Array | None = None) -> jax.Array:
    """One random key per question, a function of (seed, step, question index, copy) alone.

    Neither the place of a question in its batch nor the mesh changes its draw, and resuming needs no state.

    Args:
      seed: of the run.
      step: optimiser step.
      index: int [B], index of each question in its file.
      copy: int [B], which of the rows of a batch with the same question this is, so that each draws other groups;
        0 = the first, and of all where it is None.

    Returns: keys [B].
    """
    # The generator is named because the default may be changed by a flag.
    step_key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), step)
    keys = jax.vmap(lambda i: jax.random.fold_in(step_key, i))(index)
    if copy is None:
        return keys
    return jnp.where(copy > 0, jax.vmap(jax.random.fold_in)(keys, copy), keys)


def gumbel_draws(keys: jax.Array, logits: jax.Array, group_size: int, k: int) -> jax.Array:
    """G draws of k frames without replacement for each question: keys [B], logits [B,T] -> int32 [B,G,K].

    The frames stand in the order of drawing, which `plackett_luce_log_probs` needs.
    """
    return perturbed_top_k(logits, gumbel_noise(keys, group_size, logits.shape[-1]), k)


def gumbel_top_k(keys: jax.Array, logits: jax.Array, group_size: int, k: int) -> jax.Array:
    """`gumbel_draws` with the frames of each draw ascending in time: picks int32 [B,G,K], none twice."""
    return jnp.sort(gumbel_draws(keys, logits, group_size, k), axis=-1)


def check_candidates(mask: np.ndarray, k: int, index: np.ndarray, field: str) -> None:
    """Raises ValueError where a question has fewer than k candidate frames; for the host, before sampling.

    Args:
      mask: bool [B,T], False on padding.
      k: frames per draw.
      index: [B], what to call the questions.
      field: name of the config field that k comes from.
    """
    if k < 1:
        raise ValueError(f"{field} is {k}: at least one frame has to be picked")
    available = np.asarray(mask).sum(axis=-1)
    short = np.flatnonzero(available < k)
    if short.size:
        questions = ", ".join(f"{index[i]} ({available[i]})" for i in short)
        raise ValueError(
            f"{field} is {k}, more than the candidate frames of question {questions}: "
            f"lower {field} or leave these questions out"
        )


# ---- log-probabilities of picks --------------------------------------------------------------------------


def _logits_of(logits: jax.Array, picks: jax.Array) -> jax.Array:
    return jnp.take_along_axis(logits[:, None], picks, axis=-1)


def independent_log_probs(logits: jax.Array, picks: jax.Array) -> jax.Array:
    """log softmax(logits) of each picked frame, as if each were drawn alone: the paper's choice.

    logits [B,T], picks int [B,G,K] in any order -> float32 [B,G,K].
    """
    return _logits_of(jax.nn.log_softmax(logits), picks)


def plackett_luce_log_probs(logits: jax.Array, draws: jax.Array) -> jax.Array:
    """log-probability of each frame given the frames drawn before it; the sum over K is that of the draw.

    logits [B,T], draws int [B,G,K] in the order of drawing (`gumbel_draws`) -> float32 [B,G,K].
    """
    drawn = _logits_of(logits, draws)
    # Drawn frames get a finite floor instead of -inf: where none is left, the gradient stays free of nan.
    left = jnp.broadcast_to(logits[:, None], (*draws.shape[:2], logits.shape[-1]))
    left = jnp.put_along_axis(left, draws, jnp.finfo(logits.dtype).min, axis=-1, inplace=False)
    never_drawn = jax.nn.logsumexp(left, axis=-1, keepdims=True)
    not_yet_drawn = jax.lax.cumlogsumexp(drawn, axis=2, reverse=True)
    return drawn - jnp.logaddexp(not_yet_drawn, never_drawn)


LOG_PROBS = {"independent": independent_log_probs, "plackett_luce": plackett_luce_log_probs}


# ---- advantages: rewards [B,G] -> [B,G] ------------------------------------------------------------------


def grpo(rewards: jax.Array) -> jax.Array:
    """(r - mean) / (unbiased std + 1e-4) within each group: the paper's choice (GRPO, arXiv 2402.03300)."""
    return dr_grpo(rewards) / (jnp.std(rewards, axis=-1, ddof=1, keepdims=True) + 1e-4)


def dr_grpo(rewards: jax.Array) -> jax.Array:
    """r - mean within each group; no extra weight for easy or hard questions (arXiv 2503.20783)."""
    # Relative to the first, equal rewards give exactly 0; Adam would enlarge what rounding leaves of them.
    relative = rewards - rewards[..., :1]
    return relative - jnp.mean(relative, axis=-1, keepdims=True)


def leave_one_out(rewards: jax.Array) -> jax.Array:
    """r - mean of the others in the group (RLOO, arXiv 2402.14740)."""
    group_size = rewards.shape[-1]
    return dr_grpo(rewards) * (group_size / (group_size - 1))


ADVANTAGES = {"grpo": grpo, "dr_grpo": dr_grpo, "leave_one_out": leave_one_out}


# ---- loss and update -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Objective:
    """What is optimised; the defaults are the paper's. Raises ValueError for a name or number that makes no sense.

    Attributes:
      advantage, log_prob: of ADVANTAGES, LOG_PROBS.
      clip_low, clip_high: the ratio to the log-probabilities at the time of drawing counts between 1 - clip_low and
        1 + clip_high (PPO, and DAPO's two limits). It is 1 in the first step on a draw, so they matter in further ones.
      dead_groups: keep = the mean is over all groups, as in the paper; skip = over those that teach something;
        resample = as skip, after they were drawn anew (train.py).
      entropy: weight of the entropy of the scores, which is raised.
      kl: weight of KL(policy || initial agent) over the frames, which is lowered.
    """

    advantage: str = "grpo"
    log_prob: str = "independent"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dead_groups: str = "keep"
    entropy: float = 0.0
    kl: float = 0.0

    def __post_init__(self):
        known_of = {"advantage": ADVANTAGES, "log_prob": LOG_PROBS, "dead_groups": ("keep", "skip", "resample")}
        for field, known in known_of.items():
            if getattr(self, field) not in known:
                raise ValueError(f"objective.{field} is {getattr(self, field)!r}, not one of {', '.join(known)}")
        for field in ("clip_low", "clip_high", "entropy", "kl"):
            if getattr(self, field) < 0:
                raise ValueError(f"objective.{field} is {getattr(self, field)}, it must be at least 0")


PAPER = Objective()


def dead(rewards):
    """Which groups teach nothing, because all their rewards are equal: [B,G] -> bool [B] (numpy or jax)."""
    return rewards.max(axis=-1) == rewards.min(axis=-1)


def score_entropy(logits: jax.Array) -> jax.Array:
    """Entropy in nats of softmax(logits), 0 for padding: [B,T] -> [B]."""
    log_probs = jax.nn.log_softmax(logits)
    return -jnp.sum(jnp.exp(log_probs) * jnp.where(jnp.isfinite(log_probs), log_probs, 0.0), axis=-1)


def kl_divergence(logits: jax.Array, reference: jax.Array) -> jax.Array:
    """KL(softmax(logits) || softmax(reference)) in nats; both [B,T] with -inf on the same padding -> [B]."""
    log_probs, others = jax.nn.log_softmax(logits), jax.nn.log_softmax(reference)
    is_frame = jnp.isfinite(logits)
    difference = jnp.where(is_frame, log_probs, 0.0) - jnp.where(is_frame, others, 0.0)
    return jnp.sum(jnp.exp(log_probs) * difference, axis=-1)


def loss(
    logits: jax.Array,
    picks: jax.Array,
    rewards: jax.Array,
    objective: Objective = PAPER,
    drawn_log_probs: jax.Array | None = None,
    reference: jax.Array | None = None,
) -> tuple[jax.Array, Metrics]:
    """The paper's surrogate: -mean over B and G of A * mean_k exp(lp_k - stop_grad(lp_k)).

    Its value is 0 by construction (advantages sum to 0 in a group); only its gradient says something.

    Args:
      logits: [B,T], -inf on padding.
      picks: int [B,G,K]; in the order of drawing if the objective is Plackett-Luce.
      rewards: [B,G].
      objective: which advantages and log-probabilities, and what is added.
      drawn_log_probs: [B,G,K] of the policy that drew; then the ratio to it is clipped. None = the policy itself.
      reference: logits [B,T] of the initial agent, needed where objective.kl counts.

    Returns: the loss and the metrics `score_entropy` (nats, mean), `advantage_std` (within groups, mean),
      `dead_groups` (share of groups whose rewards are all equal: they teach nothing), `kl` where there is a reference,
      and `clipped` (share of frames whose ratio is outside the limits) where there are drawn_log_probs.

    Raises: ValueError for groups of one, and a KL without a reference.
    """
    if rewards.shape[-1] < 2:
        raise ValueError("a group has 1 draw: group_size must be at least 2 to compare rewards")
    if objective.kl and reference is None:
        raise ValueError("objective.kl counts, but the initial agent's logits are not given")
    advantages = ADVANTAGES[objective.advantage](rewards)
    log_probs = LOG_PROBS[objective.log_prob](logits, picks)
    is_dead = dead(rewards)
    entropy = score_entropy(logits).mean()
    metrics = {
        "score_entropy": entropy,
        "advantage_std": jnp.std(advantages, axis=-1, ddof=1).mean(),
        "dead_groups": jnp.mean(is_dead),
    }
    if drawn_log_probs is None:
        ratio = jnp.exp(log_probs - jax.lax.stop_gradient(log_probs))
        value = -jnp.mean(ratio.mean(axis=-1) * advantages)
    else:
        ratio = jnp.exp(log_probs - jax.lax.stop_gradient(drawn_log_probs))
        within = jnp.clip(ratio, 1 - objective.clip_low, 1 + objective.clip_high)
        value = -jnp.mean(jnp.minimum(ratio * advantages[..., None], within * advantages[..., None]))
        metrics["clipped"] = jnp.mean(ratio != within)
    if objective.dead_groups != "keep":
        value *= is_dead.size / jnp.maximum(jnp.sum(~is_dead), 1)
    if objective.entropy:
        value -= objective.entropy * entropy
    if reference is not None:
        metrics["kl"] = kl_divergence(logits, reference).mean()
        value += objective.kl * metrics["kl"]
    return value, metrics


def label_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Cross-entropy of the scores with labels, for a warm start before TSPO: -mean log softmax(logits) over them.

    Args:
      logits: [B,T], -inf on padding.
      labels: bool [B,T], the frames that hold the evidence; a question without any does not count.
    """
    log_probs = jnp.where(labels, jax.nn.log_softmax(logits), 0.0)
    of_question = -log_probs.sum(-1) / jnp.maximum(labels.sum(-1), 1)
    return of_question.sum() / jnp.maximum(labels.any(-1).sum(), 1)


def update(
    score: Callable[[Params], jax.Array],
    optimizer: optax.GradientTransformation,
    params: Params,
    opt_state: optax.OptState,
    picks: jax.Array,
    rewards: jax.Array,
    objective: Objective = PAPER,
    inner_steps: int = 1,
    reference: jax.Array | None = None,
    drew: Params | None = None,
) -> tuple[Params, optax.OptState, Metrics]:
    """`inner_steps` optimiser steps on `loss`; the paper takes one.

    Args:
      score: params -> logits [B,T] of this batch at this step's temperature.
      optimizer: from `make_optimizer`, `opt_state` from its init.
      params: of the agent.
      picks: int [B,G,K].
      rewards: [B,G].
      objective, reference: of `loss`.
      drew: parameters that drew the picks, where they are older than `params`; their ratio is then clipped.

    Returns: new params, new optimiser state, and the metrics of `loss` with its value as `loss` and the norm
      of the gradients before clipping as `grad_norm`; means over the steps.
    """
    drawn_log_probs = None
    if inner_steps > 1 or drew is not None:
        drawn_log_probs = LOG_PROBS[objective.log_prob](score(params if drew is None else drew), picks)

    def loss_of(params):
        return loss(score(params), picks, rewards, objective, drawn_log_probs, reference)

    def step(state, _):
        params, opt_state, metrics = descend(loss_of, optimizer, *state)
        return (params, opt_state), metrics

    if inner_steps == 1:
        return descend(loss_of, optimizer, params, opt_state)
    (params, opt_state), metrics = jax.lax.scan(step, (params, opt_state), length=inner_steps)
    return params, opt_state, jax.tree.map(jnp.mean, metrics)


def descend(
    loss_of: Callable[[Params], tuple[jax.Array, Metrics]],
    optimizer: optax.GradientTransformation,
    params: Params,
    opt_state: optax.OptState,
) -> tuple[Params, optax.OptState, Metrics]:
    """One optimiser step on a loss with metrics, to which its value (`loss`) and `grad_norm` are added."""
    (value, metrics), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    metrics = {**metrics, "loss": value, "grad_norm": optax.global_norm(grads)}
    return optax.apply_updates(params, updates), opt_state, metrics


def undo_if_too_far(
    kl_of: Callable[[Params], jax.Array],
    limit: float,
    before: tuple[Params, optax.OptState],
    after: tuple[Params, optax.OptState],
) -> tuple[Params, optax.OptState, Metrics]:
    """Undoes an update that took the policy further from the initial agent than `limit`, and away from it.

    The agent and the optimiser's moments go back; its counts, which the learning rate follows, go on.

    Args:
      kl_of: params -> divergence from the initial agent on this batch.
      limit: nats.
      before, after: parameters and optimiser state around the update.

    Returns: what the run goes on with, and the metrics `kl_after` (of the update) and `undone` (0 or 1).
    """
    kl, kl_after = kl_of(before[0]), kl_of(after[0])
    undone = (kl_after > limit) & (kl_after > kl)

    def choose(old, new):
        return jnp.where(undone, old, new) if jnp.issubdtype(new.dtype, jnp.floating) else new

    params, opt_state = jax.tree.map(choose, before, after)
    return params, opt_state, {"kl_after": kl_after, "undone": undone.astype(jnp.float32)}
