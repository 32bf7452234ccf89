"""Training of a tiny network from scratch by AdamW, shared by the toy world's CLIP, image tower and language model."""

from collections.abc import Callable, Iterable

import jax
import optax
from flax import nnx
from optax import contrib

from tspo_jax.checkpoints.weights import flatten, unflatten
from tspo_jax.models.layers import split_params


def fresh_params(make_module: Callable[[nnx.Rngs], nnx.Module], seed: int) -> tuple[nnx.GraphDef, dict]:
    """A module's parameters with kernels at a scale of 1 / sqrt(fan-in) and token embeddings at 1.

    The 0.02 of the published models is for widths in the thousands: at width 100 signals vanish in the layers, and
    words drown in what attention adds to them.
    """
    graphdef, params = split_params(make_module(nnx.Rngs(seed)))

    def rescale(path: str, leaf: jax.Array) -> jax.Array:
        if path.endswith("embed_tokens.embedding"):
            return leaf / 0.02
        if path.endswith("kernel") and "patch_embedding" not in path:
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


def fit(
    loss: Callable[..., jax.Array],
    params: dict,
    batches: Iterable[tuple],
    num_steps: int,
    learning_rate: float,
    report: Callable[[int, float], None],
    optimizer: Callable[[optax.Schedule], optax.GradientTransformation] = adamw,
) -> dict:
    """Parameters after `num_steps` (warm-up, cosine decay, clipping at 1.0) on `loss(params, *batch)`.

    `report` is called with every step and, one step late so that the device is not waited for, its loss.
    """
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, min(50, num_steps // 10), num_steps)
    transform = optax.chain(optax.clip_by_global_norm(1.0), optimizer(schedule))

    @jax.jit
    def step(params, opt_state, *batch):
        value, grads = jax.value_and_grad(loss)(params, *batch)
        updates, opt_state = transform.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    opt_state, last = transform.init(params), None
    for i, batch in zip(range(num_steps), batches, strict=False):
        params, opt_state, value = step(params, opt_state, *batch)
        if last is not None:
            report(i, float(last))
        last = value
    report(num_steps, float(last))
    return params
