"""Training of a tiny network from scratch by AdamW, shared by the toy world's CLIP, image tower and language model."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from optax import contrib

from tspo_jax.checkpoints.weights import flatten, unflatten
from tspo_jax.config import General
from tspo_jax.models.layers import split_params
from tspo_jax.runs.loop import Batches, Loop
from tspo_jax.runs.preemption import finish


def fresh_params(make_module: Callable[[nnx.Rngs], nnx.Module], seed: int) -> tuple[nnx.GraphDef, dict]:
    """A module's parameters with kernels at a scale of 1 / sqrt(fan-in) and token embeddings at 1.

    The 0.02 of the published models is for widths in the thousands: at width 100 signals vanish in the layers, and
    words drown in what attention adds to them.
    """
    graphdef, params = split_params(make_module(nnx.Rngs(seed)))

    def rescale(path: str, leaf: jax.Array) -> jax.Array:
        if path.endswith("embed_tokens.embedding"):
            return leaf / 0.02
        if path.endswith("kernel") and "patch_embed" not in path:
            return leaf * (leaf.shape[-2] ** -0.5 / 0.02)
        return leaf

    return graphdef, unflatten({path: rescale(path, leaf) for path, leaf in flatten(params).items()})


def adamw(schedule: optax.Schedule) -> optax.GradientTransformation:
    return optax.adamw(schedule, weight_decay=1e-3)


def muon(schedule: optax.Schedule) -> optax.GradientTransformation:
    """Muon for the kernels of stacked layers [L, in, out], AdamW for all else.

    Where AdamW needs thousands of steps until a tiny transformer binds words that stand apart, Muon needs a hundred.
    """

    def dimensions(params):
        def of_leaf(path, leaf):
            stacked = leaf.ndim == 3 and path[-1].key == "kernel"
            return contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2) if stacked else None

        return jax.tree.map_with_path(of_leaf, params)

    return contrib.muon(
        schedule, muon_weight_dimension_numbers=dimensions, consistent_rms=0.2, weight_decay=1e-3, adam_b2=0.98
    )


@dataclasses.dataclass(frozen=True)
class Fitting(General):
    """Of `fit`; `seed` is that of the parameters and batches that it is given."""

    learning_rate: float = 1e-3  # the highest: it rises, and falls along a cosine
    keep_checkpoints: int = 1


class State(NamedTuple):
    params: dict
    optimizer: optax.OptState


def fit(
    loss: Callable[..., jax.Array],
    params: dict,
    batches: Iterable[tuple],
    config: Fitting,
    run_dir: Path,
    report: Callable[[int, float], None],
    optimizer: Callable[[optax.Schedule], optax.GradientTransformation] = adamw,
) -> dict:
    """Parameters after `config.num_steps` (warm-up, cosine decay, clipping at 1.0) on `loss(params, *batch)`.

    It goes on where another start in `run_dir` ended, and ends the program with the status of runs/preemption.py at
    SIGTERM. `batches` begin with the first of the run, and those that were used are drawn again. `report` is called
    with every step and, one step late so that the device is not waited for, its loss.
    """
    num_steps = config.num_steps
    schedule = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, min(50, num_steps // 10), num_steps)
    transform = optax.chain(optax.clip_by_global_norm(1.0), optimizer(schedule))

    @jax.jit
    def update(state: State, *batch) -> tuple[State, dict]:
        value, grads = jax.value_and_grad(loss)(state.params, *batch)
        updates, opt_state = transform.update(grads, state.optimizer, state.params)
        return State(optax.apply_updates(state.params, updates), opt_state), {"loss": value}

    def row(values: Mapping[str, float]) -> None:
        report(values["step"], values["loss"])

    params = jax.tree.map(jnp.asarray, params)
    with Loop(run_dir, config, Batches(lambda first: islice(batches, first, None)), report=row, quiet=True) as loop:
        state = loop.restore(State(params, transform.init(params)))
        finish(loop.run(state, lambda step, state: update(state, *loop.batch(step))))
        return loop.state.params
