"""The compiled programs of TPO: log-probabilities of pairs, and one update of the answerer.

A pair travels as one sequence [video, prompt | chosen | rejected] (models/packed_answers.py), with its frames encoded
once. They are functions of shapes alone, so the same ones run here and are compiled ahead of time for an absent TPU.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from tspo_jax.checkpoints.weights import flatten, unflatten
from tspo_jax.devices import sharding
from tspo_jax.models import attention, packed_answers
from tspo_jax.models.families import FAMILIES
from tspo_jax.models.layers import merge_params
from tspo_jax.models.lora import is_adapter
from tspo_jax.tpo import losses
from tspo_jax.tpo.losses import AnswerLogProbs, Objective

CHOSEN, REJECTED = 0, 1
TOWERS = tuple(path for family in FAMILIES for path in family.tower)  # never trained


class Pairs(NamedTuple):
    """A batch of B pairs as arrays over the mesh axis `data`.

    Attributes:
      frames: uint8 [B, K, H, W, 3], cropped for the answerer.
      prompt_ids: int32 [B, N], right padded, one VIDEO_TOKEN each; prompt_lengths int32 [B].
      answers: int32 [B, 2, A], the chosen and the rejected answer, with their end token, right padded.
      answer_lengths: int32 [B, 2].
      weights: float32 [B], 0 for rows that only fill the batch up.
      reference: float32 [B, 2], summed log-probabilities under the reference, where they were computed before.
      steps: int32 [B, pairs of frames], where the frames lie in time; None for models that are not told.
    """

    frames: jax.Array
    prompt_ids: jax.Array
    prompt_lengths: jax.Array
    answers: jax.Array
    answer_lengths: jax.Array
    weights: jax.Array
    reference: jax.Array
    steps: jax.Array | None = None


class State(NamedTuple):
    """What an update changes: the trained parameters, and the state of their optimiser."""

    trained: dict
    optimizer: Any


class Model(NamedTuple):
    """How an answerer is run in training.

    Attributes:
      graphdef: of the answerer, with adapters where they are what is trained.
      normalize: pixels uint8 -> float, on the device.
      dtype: of the arithmetic: trained weights are float32 and are cast to it.
      encode_chunk: frames of each pair that are encoded at a time; bounds memory.
      mesh: over which the arguments are split, if they are.
      attention: what computes it, one of models.attention.IMPLEMENTATIONS.
    """

    graphdef: nnx.GraphDef
    normalize: Callable[[jax.Array], jax.Array]
    dtype: jnp.dtype
    encode_chunk: int = 16
    mesh: Mesh | None = None
    attention: str = "auto"

    def params(self, trained: Mapping, frozen: Mapping) -> dict:
        """All parameters as the arithmetic takes them; adapters stay float32 (they are cast where they are used)."""
        cast = {path: x if is_adapter(path) else x.astype(self.dtype) for path, x in flatten(trained).items()}
        return unflatten(flatten(frozen) | cast)

    def log_probs(self, params: dict, pairs: Pairs, features: jax.Array | None = None) -> AnswerLogProbs:
        """Log-probabilities of the answers, [B, 2]; `features` of the frames, where they are known already."""
        model = merge_params(self.graphdef, params)
        split = partial(sharding.split_questions, self.mesh)
        features = self.features(params, pairs.frames) if features is None else features
        tokens = split(jax.checkpoint(_project)(model, features))
        prompt = split(model.prompt(tokens, pairs.prompt_ids, pairs.prompt_lengths, pairs.steps))
        constrain = partial(sharding.split_tokens, self.mesh)
        with attention.computed_by(self.attention, self.mesh):
            hidden = packed_answers.answer_states(model, prompt, pairs.answers, constrain)
        of_tokens = packed_answers.token_log_probs(model.language_model, split(hidden), pairs.answers)
        counts = jnp.arange(pairs.answers.shape[-1]) < pairs.answer_lengths[..., None]
        return AnswerLogProbs(split(jnp.where(counts, of_tokens, 0)).sum(-1), pairs.answer_lengths)

    def features(self, params: dict, frames: jax.Array) -> jax.Array:
        """Frames uint8 [B, K, H, W, 3] -> what the frozen tower makes of them, [B, units, ...]."""
        model = merge_params(self.graphdef, params)
        size = model.cfg.temporal_patch_size
        frames = jnp.pad(frames, ((0, 0), (0, -frames.shape[1] % size), *((0, 0),) * 3), mode="edge")
        B, K = frames.shape[:2]
        chunk = min(max(1, self.encode_chunk // size) * size, K)

        def encode(frames):
            shown = sharding.split_frames(self.mesh, frames.reshape(-1, *frames.shape[2:]))
            with attention.computed_by(self.attention, self.mesh):
                features = model.tower(self.normalize(shown))
            return sharding.split_questions(self.mesh, features.reshape(B, -1, *features.shape[1:]))

        frames = jnp.pad(frames, ((0, 0), (0, -K % chunk), *((0, 0),) * 3))
        chunks = frames.reshape(B, -1, chunk, *frames.shape[2:]).swapaxes(0, 1)
        with jax.named_scope("encode"):
            features = jax.lax.map(encode, chunks).swapaxes(0, 1)
        return jax.lax.stop_gradient(features.reshape(B, -1, *features.shape[3:])[:, : K // size])


def _project(model: nnx.Module, features: jax.Array) -> jax.Array:
    """Features [B, units, ...] -> visual tokens [B, units, ...]."""
    tokens = model.project(features.reshape(-1, *features.shape[2:]))
    return tokens.reshape(*features.shape[:2], *tokens.shape[1:])


def is_trained(path: str, lora: bool) -> bool:
    """Whether training changes a parameter: the adapters, or all but the image tower. The newline vector trains with
    the language model, as in the original."""
    return is_adapter(path) if lora else not path.startswith(TOWERS)


def partition(params: Mapping, lora: bool) -> tuple[dict, dict]:
    """Parameters that are trained, and those that are not."""
    leaves = flatten(params)
    trained = {path: x for path, x in leaves.items() if is_trained(path, lora)}
    return unflatten(trained), unflatten({path: x for path, x in leaves.items() if path not in trained})


def without_adapters(params: Mapping) -> dict:
    """The parameters with every adapter's B set to 0: the model that the adapters were added to."""
    leaves = flatten(params)
    return unflatten({path: jnp.zeros_like(x) if ".lora_B." in path else x for path, x in leaves.items()})


def learning_rates(base: float, total_steps: int, warmup_steps: int) -> optax.Schedule:
    """Step s = 0, 1, ..: base s / W for s < W, then base (1 + cos(pi (s - W) / (total - W))) / 2 (Hugging Face's).

    The first update of a warm-up has rate 0. Raises ValueError where every step would have.
    """
    if not base > 0:
        raise ValueError(f"learning_rate is {base}: nothing would be learnt")
    if warmup_steps >= total_steps:
        raise ValueError(
            f"the warm-up takes {warmup_steps} of {total_steps} steps: the learning rate would never reach "
            f"{base}; take more steps or a shorter warm-up (optimizer.warmup)"
        )
    if not warmup_steps:
        return optax.cosine_decay_schedule(base, total_steps)
    return optax.warmup_cosine_decay_schedule(0.0, base, warmup_steps, total_steps)


def make_optimizer(
    rates: optax.Schedule, *, max_grad_norm: float, b1: float, b2: float, eps: float, weight_decay: float
) -> optax.GradientTransformation:
    """AdamW behind clipping by the global norm, as torch has it."""
    adamw = optax.adamw(rates, b1, b2, eps, weight_decay=weight_decay)
    return optax.chain(optax.clip_by_global_norm(max_grad_norm), adamw)


def make_reference(model: Model) -> Callable[[dict, Pairs], AnswerLogProbs]:
    """The program (params, pairs) -> log-probabilities [B, 2], for a reference that is computed once."""
    return jax.jit(model.log_probs)


def make_update(
    model: Model,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    online_reference: bool = False,
    shardings: Any = None,
) -> Callable[[State, dict, Pairs], tuple[State, dict[str, jax.Array]]]:
    """The program (state, frozen, pairs) -> (new state, metrics); `state` is donated.

    Args:
      accumulate: parts that a batch is computed in, one after another, a divisor of B; the result does not depend on
        it. Each takes every `accumulate`-th pair, so that all devices have a share of every part.
      online_reference: the reference is the model without its adapters, computed in each step; else pairs.reference.
      shardings: of the state, where it lies on a mesh.
    """
    objective.check()

    log_probs = partial(_log_probs, model, online_reference)

    def update(state: State, frozen: dict, pairs: Pairs):
        parts = jax.tree.map(lambda x: _cut(x, accumulate), pairs)
        num_pairs = pairs.weights.sum()
        num_tokens = (pairs.weights * pairs.answer_lengths[:, CHOSEN]).sum()

        def loss_of(trained, part, pull):
            policy, reference = log_probs(trained, frozen, part)
            if pull is None:
                loss, _ = losses.total_loss(objective, policy, reference, part.weights, num_pairs, num_tokens)
            else:  # the gradient of the whole batch's loss by these log-probabilities is known
                loss = jnp.vdot(pull, policy.total)
            return loss, (policy, reference)

        def step(gradient, part):
            (_, aux), more = jax.value_and_grad(loss_of, has_aux=True)(state.trained, *part)
            return jax.tree.map(jnp.add, gradient, more), aux

        pulls = None
        if objective.couples_pairs and accumulate > 1:
            pulls = _pulls(objective, *jax.lax.map(partial(log_probs, state.trained, frozen), parts), parts)
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), state.trained)
        with jax.named_scope("parts"):
            gradient, aux = jax.lax.scan(step, nothing, (parts, pulls))
        (policy, reference), weights = jax.tree.map(_join, aux), _join(parts.weights)
        loss, of_loss = losses.total_loss(objective, policy, reference, weights)
        metrics = {"loss": loss, **of_loss, "grad_norm": optax.global_norm(gradient)}
        metrics |= losses.pair_metrics(objective, policy, reference, weights)
        changes, optimizer_state = optimizer.update(gradient, state.optimizer, state.trained)
        return State(optax.apply_updates(state.trained, changes), optimizer_state), metrics

    everywhere = None if model.mesh is None else sharding.replicated(model.mesh)
    out = None if shardings is None else (shardings, everywhere)
    return jax.jit(update, donate_argnums=0, out_shardings=out)


def make_evaluation(model: Model, *, online_reference: bool = False) -> Callable:
    """The program (trained, frozen, pairs) -> log-probabilities under the policy and the reference, [B, 2] each."""

    return jax.jit(partial(_log_probs, model, online_reference))


def _log_probs(
    model: Model, online_reference: bool, trained: dict, frozen: dict, pairs: Pairs
) -> tuple[AnswerLogProbs, AnswerLogProbs]:
    """Of the answers, under the policy and the reference; the frames are encoded once for both."""
    params = model.params(trained, frozen)
    features = model.features(params, pairs.frames)
    policy = model.log_probs(params, pairs, features)
    if not online_reference:
        return policy, AnswerLogProbs(pairs.reference, pairs.answer_lengths)
    before = model.log_probs(model.params(without_adapters(trained), frozen), pairs, features)
    return policy, jax.lax.stop_gradient(before)


def _pulls(objective: Objective, policy: AnswerLogProbs, reference: AnswerLogProbs, parts: Pairs) -> jax.Array:
    """The gradient of the whole batch's loss by each answer's log-probability, float32 [parts, b, 2]."""

    def loss(total):
        whole = jax.tree.map(_join, (AnswerLogProbs(total, policy.tokens), reference, parts.weights))
        return losses.total_loss(objective, *whole)[0]

    return jax.grad(loss)(policy.total)


def _cut(x: jax.Array, parts: int) -> jax.Array:
    """[B, ...] -> [parts, B / parts, ...]; the rows that a device holds stay there."""
    return x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)


def _join(x: jax.Array) -> jax.Array:
    """[parts, b, ...] -> [parts * b, ...], in the order of the parts."""
    return x.reshape(-1, *x.shape[2:])
