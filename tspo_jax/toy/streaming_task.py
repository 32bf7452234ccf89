"""The smallest task that needs a stream's memory and a choice among its clips: objects to look up, flashes to count.

Each clip shows one object in one colour (vectors added to one patch of noise); in some clips there is a flash. A
question asks for the colour of an object, whose clip is the evidence, or for the number of flashes, which is nowhere
but in the whole stream. What a selection without learning can reach is chance on lookups, and without a memory that is
handed on counts suffer.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from tspo_jax.checkpoints.weights import flatten, unflatten
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
    """Of B videos: clips [B, K, T, P, C], times [B, K, 2]. Of their Q questions, those of a video beside each other:
    prompts int [Q, 3] (the video, two words), answers int [Q], evidence bool [Q, K] (none for counts), is_lookup
    bool [Q]."""

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


def draw(task: Task, rng: np.random.Generator, videos: int, questions: int = 1) -> Batch:
    """Fresh videos and so many questions about each. Drawn on the host: compiled, the generator takes longer to compile
    than the networks."""
    objects, colours, flash = vectors(task)
    B, Q, K, cells = videos, videos * questions, task.clips, task.frames * task.patches
    shown = rng.permuted(np.tile(np.arange(task.objects), (B, 1)), axis=1)[:, :K]
    colour = rng.integers(task.colours, size=(B, K))
    number = rng.integers(min(task.flashes, K) + 1, size=B)
    has_flash = rng.permuted(np.tile(np.arange(K), (B, 1)), axis=1) < number[:, None]
    features = rng.normal(scale=NOISE, size=(B, K, cells, task.features))
    video, clip = np.ogrid[:B, :K]
    features[video, clip, rng.integers(cells, size=(B, K))] += objects[shown] + colours[colour]
    features[video, clip, rng.integers(cells, size=(B, K))] += has_flash[..., None] * flash
    asked, is_lookup = rng.integers(K, size=Q), rng.random(Q) < 0.5
    row = np.repeat(np.arange(B), questions)
    first = np.where(is_lookup, task.objects, task.objects + 1)
    second = np.where(is_lookup, shown[row, asked], task.objects + 1)
    start = np.tile(np.arange(K, dtype=np.float32) * task.frames, (B, 1))
    return Batch(
        features.reshape(B, K, task.frames, task.patches, task.features).astype(np.float32),
        np.stack([start, start + task.frames], axis=-1),
        np.stack([np.full(Q, VIDEO_TOKEN), first, second], axis=-1).astype(np.int32),
        (task.first_colour + np.where(is_lookup, colour[row, asked], task.colours + number[row])).astype(np.int32),
        (np.arange(K) == asked[:, None]) & is_lookup[:, None],
        is_lookup,
    )


class Toy(nnx.Module):
    """The encoder, and a language model that answers from its visual tokens."""

    def __init__(self, cfg: StreamingConfig, task: Task, *, rngs: nnx.Rngs):
        self.encoder = StreamingEncoder(cfg, rngs=rngs)
        # Not tied: the word that was asked about would be its own answer at first, and colours are learnt late.
        sizes = {"vocab_size": task.vocab_size, "hidden_size": cfg.answerer_width, "tie_word_embeddings": False}
        language = dataclasses.replace(cfg.language, **sizes)
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
      schedule: of the second stage, whole streams.
      one_clip: steps of the first stage: streams of one clip, whose memory an answer must be read from.
      short, short_clips: steps of a stage between the two, and the clips of its streams: where streams are long,
        counting is learnt on short ones.
      selection: of SELECTIONS; last and uniform pick without learning.
      propagate: hand the memory on.
      videos, questions: videos of a step, and questions about each, which cost little beside its encoding. The first
        stage has as many questions, each about a video of its own.
    """

    schedule: Schedule = Schedule(2000, 800, 0.1)
    one_clip: int = 150
    short: int = 0
    short_clips: int = 4
    selection: str = "learned"
    propagate: bool = True
    learning_rate: float = 3e-3
    videos: int = 16
    questions: int = 4


class State(NamedTuple):
    params: dict
    moments: optax.OptState


# At a rate of 1: rate and weight are arguments of a step, so that runs of other schedules share its program.
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1.0))


def forward(
    model: Toy, batch: Batch, noise: jax.Array | None, selection: str = "learned", propagate: bool = True
) -> tuple[jax.Array, ...]:
    """Of the questions: logits [Q, vocabulary] of the answer, the scores [Q, K] and the picks [Q, V]."""
    encoder, cfg = model.encoder, model.encoder.cfg
    stream = encoder.encode(batch.clips, batch.times, jnp.ones(batch.clips.shape[:2], bool), propagate=propagate)
    (Q, K), is_clip = batch.evidence.shape, jnp.ones(batch.evidence.shape, bool)
    stream = jax.tree.map(lambda x: jnp.repeat(x, Q // len(batch.clips), axis=0), stream)
    words = model.language_model.embed_tokens(batch.prompts[:, 1:])
    fixed = {"last": np.arange(K - cfg.selected, K), "uniform": np.linspace(0, K - 1, cfg.selected).astype(int)}
    picks = jnp.tile(fixed[selection], (Q, 1)) if selection in fixed else None
    chosen = encoder.select(words, jnp.full(Q, words.shape[1]), stream, is_clip, noise, picks)
    visual = encoder.visual_tokens(chosen.memories, stream.last)
    text = model.language_model.embed_tokens(jnp.maximum(batch.prompts, 0))
    x = splice(text, visual[:, None], batch.prompts)
    places = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
    hidden, _ = model.language_model.prefill(x, places, jnp.full(Q, x.shape[1] - 1))
    return model.language_model.logits(hidden), chosen.scores, chosen.picks


def train(
    task: Task,
    cfg: StreamingConfig,
    recipe: Recipe,
    seed: int,
    report: Callable[[int, nnx.GraphDef, State], None] = lambda *_: None,
    report_every: int = 150,
) -> tuple[nnx.GraphDef, State]:
    """A run on fresh videos; `report` gets the step of the second stage and what there is, now and then.

    Returns: the structure and the state.
    """
    graphdef, params = fresh_params(lambda rngs: Toy(cfg, task, rngs=rngs), seed)
    # Words and learned vectors at a scale of 1 drown what patches add to them.
    tables = {path: 0.1 * leaf for path, leaf in flatten(params).items() if path.endswith("embed_tokens.embedding")}
    params = unflatten(flatten(params) | tables)
    state = State(params, OPTIMIZER.init(params))
    one, alone = dataclasses.replace(task, clips=1), (recipe.videos * recipe.questions, 1)
    for number in range(recipe.one_clip):
        batch, noise = drawn_for(one, alone, seed, FIRST_STAGE + number)
        state = step(graphdef, "learned", True, state, batch, noise, 0.0, recipe.learning_rate * min(1, number / 50))
    short = dataclasses.replace(task, clips=recipe.short_clips)
    for number in range(recipe.short):
        batch, noise = drawn_for(short, (recipe.videos, recipe.questions), seed, 2 * FIRST_STAGE + number)
        of_step = recipe.learning_rate * min(1, number / 50)
        state = step(graphdef, recipe.selection, recipe.propagate, state, batch, noise, 1.0, of_step)
    rate = rates(recipe)
    for number in range(recipe.schedule.steps):
        batch, noise = drawn_for(task, (recipe.videos, recipe.questions), seed, number)
        weight, of_step = float(recipe.schedule.weight(number)), float(rate(number))
        state = step(graphdef, recipe.selection, recipe.propagate, state, batch, noise, weight, of_step)
        if (number + 1) % report_every == 0 or number + 1 == recipe.schedule.steps:
            report(number + 1, graphdef, state)
    return graphdef, state


FIRST_STAGE = 10**6  # numbers of its steps, for drawing


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=3)
def step(graphdef, selection, propagate, state, batch, noise, weight, rate):
    """One update of a State; `weight` is that of the selection loss."""

    def loss(params):
        logits, scores, _ = forward(merge_params(graphdef, params), batch, noise, selection, propagate)
        answer = answer_loss(logits[:, None], batch.answers[:, None])
        return answer + weight * selection_loss(scores, batch.evidence)

    updates, moments = OPTIMIZER.update(jax.grad(loss)(state.params), state.moments, state.params)
    return State(jax.tree.map(lambda p, update: p + rate * update, state.params, updates), moments)


def rates(recipe: Recipe) -> optax.Schedule:
    """The learning rate of the second stage: up in 50 steps, a quarter of it from 80 % of the steps on."""
    steps = recipe.schedule.steps
    rise = min(50, steps)
    falling = optax.piecewise_constant_schedule(recipe.learning_rate, {max(int(0.8 * steps) - rise, 1): 0.25})
    return optax.join_schedules([optax.linear_schedule(0, recipe.learning_rate, rise), falling], [rise])


def drawn_for(task: Task, number: tuple[int, int], seed: int, step: int) -> tuple[Batch, np.ndarray]:
    """The videos of a step with their questions, and Gumbel noise [Q, K]."""
    rng = np.random.default_rng((seed, step))
    batch = draw(task, rng, *number)
    return batch, rng.gumbel(size=batch.evidence.shape).astype(np.float32)


def accuracies(
    graphdef: nnx.GraphDef, params: dict, task: Task, recipe: Recipe, number: int = 1024, seed: int = 10**6
) -> dict[str, float]:
    """On fresh videos, without noise: `lookup` and `count`, and the share of lookups whose clip was picked."""
    batch = draw(task, np.random.default_rng(seed), number)
    logits, _, picks = _answer(graphdef, recipe.selection, recipe.propagate, params, batch)
    right = np.asarray(jnp.argmax(logits, -1) == batch.answers)
    is_lookup = np.asarray(batch.is_lookup)
    found = float(found_evidence(picks, batch.evidence))
    return {"lookup": float(right[is_lookup].mean()), "count": float(right[~is_lookup].mean()), "found": found}


@partial(jax.jit, static_argnums=(0, 1, 2))
def _answer(graphdef, selection, propagate, params, batch):
    return forward(merge_params(graphdef, params), batch, None, selection, propagate)
