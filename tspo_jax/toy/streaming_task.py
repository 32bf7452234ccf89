"""The smallest task that needs a stream's memory and a choice among its clips: objects to look up, flashes to count.

Each clip shows one object in one colour (vectors added to one patch of noise); in some clips there is a flash. A
question asks for the colour of an object, whose clip is the evidence, or for the number of flashes, which is nowhere
but in the whole stream. What a selection without learning can reach is chance on lookups, and without a memory that is
handed on counts suffer.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from tspo_jax.models.layers import merge_params
from tspo_jax.models.qwen2 import Qwen2
from tspo_jax.models.streaming import StreamingConfig, StreamingEncoder
from tspo_jax.models.video_prompt import VIDEO_TOKEN, splice
from tspo_jax.streaming.objective import Schedule, answer_loss, found_evidence, selection_loss
from tspo_jax.toy.fitting import fresh_params

NOISE, FLASH = 0.3, 1.5  # standard deviation of a feature; of the flash's vector
SELECTIONS = ("learned", "last", "uniform")


@dataclasses.dataclass(frozen=True)
class Task:
    """Sizes of the task.

    Attributes:
      clips, frames, patches: K, T and P; `features` is C.
      objects: each in at most one clip; at least `clips`.
      flashes: the largest number of them.
    """

    clips: int = 6
    frames: int = 2
    patches: int = 4
    features: int = 24
    objects: int = 8
    colours: int = 4
    flashes: int = 3

    @property
    def vocab_size(self) -> int:
        """Objects, two kinds of question, colours, numbers."""
        return self.objects + 2 + self.colours + self.flashes + 1

    @property
    def first_colour(self) -> int:
        return self.objects + 2


class Batch(NamedTuple):
    """clips [B, K, T, P, C], times [B, K, 2], prompts int [B, 3] (the video, two words), answers int [B], evidence bool
    [B, K] (none for counts), is_lookup bool [B]."""

    clips: np.ndarray
    times: np.ndarray
    prompts: np.ndarray
    answers: np.ndarray
    evidence: np.ndarray
    is_lookup: np.ndarray


def vectors(task: Task, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What objects [objects, C], colours [colours, C] and a flash [C] add to a patch."""
    rng = np.random.default_rng(seed)
    sizes = (task.objects, task.features), (task.colours, task.features), (task.features,)
    objects, colours, flash = (rng.normal(size=size) for size in sizes)
    return objects, colours, FLASH * flash


def draw(task: Task, rng: np.random.Generator, batch_size: int) -> Batch:
    """Fresh videos and one question about each. Drawn on the host: compiled, the generator takes longer to compile
    than the networks."""
    objects, colours, flash = vectors(task)
    B, K, cells = batch_size, task.clips, task.frames * task.patches
    shown = rng.permuted(np.tile(np.arange(task.objects), (B, 1)), axis=1)[:, :K]
    colour = rng.integers(task.colours, size=(B, K))
    number = rng.integers(task.flashes + 1, size=B)
    has_flash = rng.permuted(np.tile(np.arange(K), (B, 1)), axis=1) < number[:, None]
    features = rng.normal(scale=NOISE, size=(B, K, cells, task.features))
    video, clip = np.ogrid[:B, :K]
    features[video, clip, rng.integers(cells, size=(B, K))] += objects[shown] + colours[colour]
    features[video, clip, rng.integers(cells, size=(B, K))] += has_flash[..., None] * flash
    asked, is_lookup = rng.integers(K, size=B), rng.random(B) < 0.5
    row = np.arange(B)
    first = np.where(is_lookup, task.objects, task.objects + 1)
    second = np.where(is_lookup, shown[row, asked], task.objects + 1)
    start = np.tile(np.arange(K, dtype=np.float32) * task.frames, (B, 1))
    return Batch(
        features.reshape(B, K, task.frames, task.patches, task.features).astype(np.float32),
        np.stack([start, start + task.frames], axis=-1),
        np.stack([np.full(B, VIDEO_TOKEN), first, second], axis=-1).astype(np.int32),
        (task.first_colour + np.where(is_lookup, colour[row, asked], task.colours + number)).astype(np.int32),
        (np.arange(K) == asked[:, None]) & is_lookup[:, None],
        is_lookup,
    )


class Toy(nnx.Module):
    """The encoder, and a language model that answers from its visual tokens."""

    def __init__(self, cfg: StreamingConfig, task: Task, *, rngs: nnx.Rngs):
        self.encoder = StreamingEncoder(cfg, rngs=rngs)
        language = dataclasses.replace(cfg.language, vocab_size=task.vocab_size, hidden_size=cfg.answerer_width)
        self.language_model = Qwen2(language, rngs=rngs)


def sizes(task: Task, width: int = 32, summary: int = 2, **options) -> StreamingConfig:
    return StreamingConfig(
        feature_width=task.features,
        answerer_width=width,
        frames=task.frames,
        cells=summary // task.frames,
        width=width,
        num_layers=2,
        num_heads=4,
        num_kv_heads=4,
        hidden=2 * width,
        **{"selected": 2, **options},
    )


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a run is trained.

    Attributes:
      selection: of SELECTIONS; last and uniform pick without learning.
      propagate: hand the memory on.
    """

    schedule: Schedule = Schedule(2000, 700, 0.1)
    selection: str = "learned"
    propagate: bool = True
    learning_rate: float = 2e-3
    batch_size: int = 32


def forward(model: Toy, batch: Batch, recipe: Recipe, noise: jax.Array | None) -> tuple[jax.Array, ...]:
    """Logits [B, V] of the answer, the scores [B, K] and the picks [B, V]."""
    encoder, cfg = model.encoder, model.encoder.cfg
    is_clip = jnp.ones(batch.evidence.shape, bool)
    stream = encoder.encode(batch.clips, batch.times, is_clip, propagate=recipe.propagate)
    words = model.language_model.embed_tokens(batch.prompts[:, 1:])
    B, K = is_clip.shape
    fixed = {"last": np.arange(K - cfg.selected, K), "uniform": np.linspace(0, K - 1, cfg.selected).astype(int)}
    picks = jnp.tile(fixed[recipe.selection], (B, 1)) if recipe.selection in fixed else None
    chosen = encoder.select(words, jnp.full(B, words.shape[1]), stream, is_clip, noise, picks)
    visual = encoder.visual_tokens(chosen.memories, stream.last)
    text = model.language_model.embed_tokens(jnp.maximum(batch.prompts, 0))
    x = splice(text, visual[:, None], batch.prompts)
    places = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
    hidden, _ = model.language_model.prefill(x, places, jnp.full(B, x.shape[1] - 1))
    return model.language_model.logits(hidden), chosen.scores, chosen.picks


def train(
    task: Task,
    cfg: StreamingConfig,
    recipe: Recipe,
    seeds: Sequence[int],
    report: Callable[[int, list[dict[str, float]]], None] = lambda *_: None,
    evaluate_every: int = 250,
) -> tuple[nnx.GraphDef, dict]:
    """Runs with several seeds beside each other on fresh videos; `report` gets the accuracies of each now and then.

    Returns the structure and the parameters, with the seeds on a leading axis.
    """
    made = [fresh_params(lambda rngs: Toy(cfg, task, rngs=rngs), seed) for seed in seeds]
    graphdef, params = made[0][0], jax.tree.map(lambda *leaves: jnp.stack(leaves), *(params for _, params in made))
    steps = recipe.schedule.steps
    rate = optax.join_schedules(
        [
            optax.linear_schedule(0, recipe.learning_rate, min(100, steps)),
            optax.piecewise_constant_schedule(recipe.learning_rate, {max(int(0.7 * steps) - 100, 1): 0.25}),
        ],
        [min(100, steps)],
    )
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))

    def step(params, opt_state, batch, noise, number):
        def loss(params):
            logits, scores, _ = forward(merge_params(graphdef, params), batch, recipe, noise)
            answer = answer_loss(logits[:, None], batch.answers[:, None])
            return answer + recipe.schedule.weight(number) * selection_loss(scores, batch.evidence)

        updates, opt_state = optimizer.update(jax.grad(loss)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    one_step = jax.jit(jax.vmap(step, in_axes=(0, 0, 0, 0, None)), donate_argnums=(0, 1))
    opt_state, rngs = jax.vmap(optimizer.init)(params), [np.random.default_rng(seed) for seed in seeds]
    for number in range(steps):
        batches = [draw(task, rng, recipe.batch_size) for rng in rngs]
        noise = np.stack([rng.gumbel(size=(recipe.batch_size, task.clips)).astype(np.float32) for rng in rngs])
        params, opt_state = one_step(
            params, opt_state, Batch(*map(np.stack, zip(*batches, strict=True))), noise, number
        )
        if (number + 1) % evaluate_every == 0 or number + 1 == steps:
            report(number + 1, [accuracies(graphdef, of_seed(params, i), task, recipe) for i in range(len(seeds))])
    return graphdef, params


def of_seed(params: dict, index: int) -> dict:
    return jax.tree.map(lambda leaf: leaf[index], params)


def accuracies(
    graphdef: nnx.GraphDef, params: dict, task: Task, recipe: Recipe, number: int = 1024, seed: int = 10**6
) -> dict[str, float]:
    """On fresh videos, without noise: `lookup` and `count`, and the share of lookups whose clip was picked."""
    batch = draw(task, np.random.default_rng(seed), number)
    logits, _, picks = _answer(graphdef, recipe, params, batch)
    right = np.asarray(jnp.argmax(logits, -1) == batch.answers)
    is_lookup = np.asarray(batch.is_lookup)
    found = float(found_evidence(picks, batch.evidence))
    return {"lookup": float(right[is_lookup].mean()), "count": float(right[~is_lookup].mean()), "found": found}


@partial(jax.jit, static_argnums=(0, 1))
def _answer(graphdef, recipe, params, batch):
    return forward(merge_params(graphdef, params), batch, recipe, None)
