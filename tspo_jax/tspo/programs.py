"""Two of the three compiled programs of a training step: `sample` and `update` (the third is rollout.py's).

They are functions of shapes alone, so the same ones run here and are compiled ahead of time for an absent TPU. A batch
is a dict of arrays over the mesh axis `data`:

    index int [B], features float [B,T,D], text float [B,D], mask bool [B,T]
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from tspo_jax.config import Config
from tspo_jax.devices import sharding
from tspo_jax.models.clip import cosine_similarity
from tspo_jax.models.layers import merge_params
from tspo_jax.tspo import policy
from tspo_jax.tspo.span_loss import longest_run, span_loss


class TrainState(NamedTuple):
    """What an update changes.

    Attributes:
      agent: parameters.
      optimizer: its state.
      drew: the agent before the last update, which has drawn the next picks (policy.stale_steps); else None.
    """

    agent: Any
    optimizer: Any
    drew: Any = None


def score(
    graphdef: nnx.GraphDef,
    agent: dict,
    batch: dict,
    tau: jax.Array,
    of_agent: Callable[[nnx.Module], Callable] = lambda agent: agent,
) -> jax.Array:
    """Logits float32 [B,T] of a batch's candidate frames at temperature tau, -inf on padding; or what another method
    of the agent, called like it, gives."""
    with jax.default_matmul_precision("highest"):  # float32 is bfloat16 passes on a TPU otherwise
        clip_scores = cosine_similarity(batch["text"], batch["features"])
        call = of_agent(merge_params(graphdef, agent))
        return call(batch["features"], batch["text"], clip_scores, batch["mask"], tau)


def temperature(config: Config, step) -> jax.Array:
    return policy.temperature(step, config.num_steps, config.policy.tau_start, config.policy.tau_end)


def optimizer_steps(config: Config, step, minimum: Callable = jnp.minimum):
    """Steps that the optimiser has taken after `step` steps of the run: several in each that has a rollout."""
    p = config.policy
    return step * p.inner_steps - minimum(step, p.warm_start_steps) * (p.inner_steps - 1)


def learning_rate(config: Config, step) -> jax.Array:
    """At a step of the run: what the optimiser's own count gives."""
    total = optimizer_steps(config, config.num_steps, min)
    return policy.learning_rate(optimizer_steps(config, step), total, config.optimizer.learning_rate)


def make_optimizer(config: Config) -> optax.GradientTransformation:
    o, total = config.optimizer, optimizer_steps(config, config.num_steps, min)
    return policy.make_optimizer(
        total, o.learning_rate, o.max_grad_norm, b1=o.b1, b2=o.b2, eps=o.eps, weight_decay=o.weight_decay
    )


def make_objective(config: Config) -> policy.Objective:
    p = config.policy
    return policy.Objective(p.advantage, p.log_prob, p.clip_low, p.clip_high, p.dead_groups, p.entropy, p.kl)


def make_sample(graphdef: nnx.GraphDef, config: Config, mesh: Mesh) -> Callable:
    """The program (agent, batch, step, k, attempt=0) -> draws int32 [B,G,K], each in the order of drawing.

    Another attempt at a step draws with other noise: that of a step behind the last one.
    """

    def sample(agent, batch, step, k, attempt=0):
        logits = score(graphdef, agent, batch, temperature(config, step))
        keys = policy.question_keys(config.seed, step + attempt * config.num_steps, batch["index"], batch.get("copy"))
        return policy.gumbel_draws(keys, logits, config.policy.group_size, k)

    return jax.jit(sample, static_argnames="k", out_shardings=sharding.over_questions(mesh))


def make_update(graphdef: nnx.GraphDef, config: Config, mesh: Mesh) -> Callable:
    """The program (state, batch, draws, measured, step, initial=None) -> (new state, metrics).

    `state` is donated. `measured` is a dict of float arrays over `data`: `optimised` [B,G], or else `total`, is the
    reward that is optimised; the mean of each other one is among the metrics, taken here so that it is one over all
    processes. `initial` is the agent that the run started from, needed where config.policy.kl or kl_limit counts. With
    stale_steps the draws are those of `state.drew`, and the agent before the update becomes the next one's.
    """
    objective, limit = make_objective(config), config.policy.kl_limit
    optimizer = make_optimizer(config)

    def update(state, batch, draws, measured, step, initial=None):
        tau = temperature(config, step)

        def logits(agent):
            return score(graphdef, agent, batch, tau)

        reference = None if initial is None else logits(initial)
        agent, opt_state, metrics = policy.update(
            logits,
            optimizer,
            state.agent,
            state.optimizer,
            draws,
            measured.get("optimised", measured["total"]),
            objective,
            config.policy.inner_steps,
            reference,
            state.drew,
        )
        if limit:
            agent, opt_state, further = policy.undo_if_too_far(
                lambda agent: policy.kl_divergence(logits(agent), reference).mean(),
                limit,
                (state.agent, state.optimizer),
                (agent, opt_state),
            )
            metrics |= further
        metrics |= {name: values.mean() for name, values in measured.items() if name != "optimised"}
        metrics |= {"tau": tau, "learning_rate": learning_rate(config, step)}
        return TrainState(agent, opt_state, None if state.drew is None else state.agent), metrics

    return jax.jit(update, donate_argnums=0, out_shardings=sharding.replicated(mesh))


def make_warm_start(graphdef: nnx.GraphDef, config: Config, mesh: Mesh) -> Callable:
    """The program (state, batch, labels bool [B,T], step) -> (new state, metrics): a step on labels, without rollout.

    `state` is donated. Metrics: `label_loss`, `score_entropy`, `grad_norm`, `tau`, `learning_rate`.
    """
    optimizer = make_optimizer(config)

    def warm_start(state, batch, labels, step):
        tau = temperature(config, step)

        def loss_of(agent):
            if config.agent.kind == "span":
                of_ends = score(graphdef, agent, batch, tau, lambda agent: agent.span_logits)
                loss, logits = span_loss(of_ends, *longest_run(labels)), of_ends.mean(axis=-1)
            else:
                logits = score(graphdef, agent, batch, tau)
                loss = policy.label_loss(logits, labels)
            return loss, {"score_entropy": policy.score_entropy(logits).mean()}

        agent, opt_state, metrics = policy.descend(loss_of, optimizer, state.agent, state.optimizer)
        metrics = {"label_loss": metrics.pop("loss"), **metrics}
        metrics |= {"tau": tau, "learning_rate": learning_rate(config, step)}
        return TrainState(agent, opt_state, None if state.drew is None else state.agent), metrics

    return jax.jit(warm_start, donate_argnums=0, out_shardings=sharding.replicated(mesh))
