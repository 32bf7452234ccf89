"""Two of the three compiled programs of a training step: `sample` and `update` (the third is rollout.py's).

They are functions of shapes alone, so the same ones run here and are compiled ahead of time for an absent TPU. A batch
is a dict of arrays over the mesh axis `data`:

    index int [B], features float [B,T,D], text float [B,D], mask bool [B,T]
"""

from collections.abc import Callable

import jax
import optax
from flax import nnx
from jax.sharding import Mesh

from tspo_jax import policy, sharding
from tspo_jax.config import Config
from tspo_jax.models.clip import cosine_similarity
from tspo_jax.models.layers import merge_params
from tspo_jax.run_folder import TrainState


def score(graphdef: nnx.GraphDef, agent: dict, batch: dict, tau: jax.Array) -> jax.Array:
    """Logits float32 [B,T] of a batch's candidate frames at temperature tau; -inf on padding."""
    with jax.default_matmul_precision("highest"):  # float32 is bfloat16 passes on a TPU otherwise
        clip_scores = cosine_similarity(batch["text"], batch["features"])
        return merge_params(graphdef, agent)(batch["features"], batch["text"], clip_scores, batch["mask"], tau)


def temperature(config: Config, step) -> jax.Array:
    return policy.temperature(step, config.num_steps, config.policy.tau_start, config.policy.tau_end)


def make_optimizer(config: Config) -> optax.GradientTransformation:
    o = config.optimizer
    return policy.make_optimizer(
        config.num_steps, o.learning_rate, o.max_grad_norm, b1=o.b1, b2=o.b2, eps=o.eps, weight_decay=o.weight_decay
    )


def make_sample(graphdef: nnx.GraphDef, config: Config, mesh: Mesh) -> Callable:
    """The program (agent, batch, step, k) -> draws int32 [B,G,K], each in the order in which its frames were drawn."""

    def sample(agent, batch, step, k):
        logits = score(graphdef, agent, batch, temperature(config, step))
        keys = policy.question_keys(config.seed, step, batch["index"])
        return policy.gumbel_draws(keys, logits, config.policy.group_size, k)

    return jax.jit(sample, static_argnames="k", out_shardings=sharding.over_questions(mesh))


def make_update(graphdef: nnx.GraphDef, config: Config, mesh: Mesh) -> Callable:
    """The program (state, batch, draws, measured, step) -> (new state, metrics).

    `state` is donated. `measured` is a dict of float arrays over `data`: `total` [B,G] is the reward that is optimised;
    the mean of each is among the metrics, taken here so that it is one over all processes.
    """
    objective = policy.Objective(config.policy.advantage, config.policy.log_prob)
    optimizer = make_optimizer(config)

    def update(state, batch, draws, measured, step):
        tau = temperature(config, step)
        agent, opt_state, metrics = policy.update(
            lambda agent: score(graphdef, agent, batch, tau),
            optimizer,
            state.agent,
            state.optimizer,
            draws,
            measured["total"],
            objective,
        )
        metrics |= {name: values.mean() for name, values in measured.items()}
        metrics |= {
            "tau": tau,
            "learning_rate": policy.learning_rate(step, config.num_steps, config.optimizer.learning_rate),
        }
        return TrainState(agent, opt_state), metrics

    return jax.jit(update, donate_argnums=0, out_shardings=sharding.replicated(mesh))
