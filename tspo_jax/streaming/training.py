"""A run of training a streaming encoder on the shared loop, in one of its two stages.

clip   one clip of a video, and a question about it: the answer's loss alone
video  a stream of clips: with the selection loss first, then mostly by the answer through the drawn clips

The answerer is frozen; its tower's tokens of a frame are the features of the clips, and its language model reads the
memories in the place of a video.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from tspo_jax.checkpoints import weights
from tspo_jax.checkpoints.folders import Answerer, load_answerer
from tspo_jax.data.frame_store import FrameStore
from tspo_jax.data.questions import questions_sha256, read_questions
from tspo_jax.devices import sharding
from tspo_jax.models import attention
from tspo_jax.models.gumbel_top_k import gumbel_noise
from tspo_jax.models.layers import merge_params, split_params
from tspo_jax.models.streaming import StreamingConfig, StreamingEncoder
from tspo_jax.models.video_prompt import splice
from tspo_jax.runs.loop import Batches, Loop
from tspo_jax.streaming import folders
from tspo_jax.streaming.clips import QuestionBatch, QuestionClips
from tspo_jax.streaming.config import MAY_DIFFER, StreamingTraining
from tspo_jax.streaming.objective import Schedule, answer_loss, found_evidence, selection_loss

COLUMNS = {
    "step": "step",
    "loss": "loss",
    "losses/answer": "answer",
    "losses/selection": "selection",
    "right": "right",
    "evidence_found": "found",
    "grad_norm": "gradient",
    "learning_rate": "rate",
    "seconds/data": "data",
    "seconds/update": "update",
}


class State(NamedTuple):
    params: dict  # of the encoder, float32
    moments: optax.OptState


def encoder_config(config: StreamingTraining, answerer: Answerer) -> StreamingConfig:
    width = answerer.config.language.hidden_size
    return StreamingConfig(feature_width=width, answerer_width=width, **dataclasses.asdict(config.encoder))


def train(config: StreamingTraining, run_dir: Path, devices: Sequence[jax.Device]) -> bool:
    """Trains until `config.num_steps` updates are done, from the newest checkpoint of `run_dir` if it has one; then the
    encoder is written to RUN_DIR/encoder. Returns False where SIGTERM stopped it before."""
    mesh = sharding.make_mesh(config.mesh.axes, devices)
    sharding.check_batch_size(mesh, config.batch_size)
    schedule = Schedule(config.num_steps, config.labelled_steps, config.kept if config.stage == "video" else 0.0)
    questions, bad = read_questions(config.data.questions, strict=False, max_bad=config.data.max_bad)
    a = config.answerer
    split = config.mesh.split_over_data
    where = sharding.answerer_sharding(mesh, weights.read_config(a.folder), split_over_data=split)
    answerer = load_answerer(a.folder, jnp.dtype(a.dtype), where, a.video, a.adapter)
    folders.check_answerer(answerer)
    sizes = encoder_config(config, answerer)
    graphdef, params = initial(config, sizes, answerer)
    params = place(params, encoder_sharding(mesh, sizes))
    warmup = max(1, math.ceil(config.optimizer.warmup * config.num_steps))
    rate = optax.warmup_cosine_decay_schedule(0.0, config.optimizer.learning_rate, warmup, config.num_steps)
    optimizer = optax.chain(optax.clip_by_global_norm(config.optimizer.max_grad_norm), optax.adam(rate))
    moments = jax.jit(optimizer.init, out_shardings=sharding.optimizer_sharding(optimizer, params, mesh))(params)
    fresh = State(params, moments)
    # Where the state comes from it goes to: else the second step would compile once more.
    out = jax.tree.map(lambda x: x.sharding, fresh), sharding.replicated(mesh)
    update = make_update(config, graphdef, answerer, optimizer, schedule, rate, mesh)
    update = jax.jit(update, donate_argnums=0, out_shardings=out)

    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(config.data.decode_threads))
        store = FrameStore(config.data.store)
        batches = QuestionClips(
            questions,
            store,
            answerer,
            pool,
            frames=sizes.frames,
            clips=config.data.clips,
            one_clip=config.stage == "clip",
            batch_size=config.batch_size,
            seed=config.seed,
            share=sharding.data_slice(mesh),
        )
        content = {
            "data.questions": questions_sha256(questions),
            "data.store": store.frames_sha256(question.video for question in questions),
            "answerer.folder": folders.identity_of(answerer),
        }
        loop = stack.enter_context(
            Loop(
                run_dir,
                config,
                Batches(batches.endless),
                put=lambda batch: sharding.put_batch(mesh, batch),
                may_differ=MAY_DIFFER,
                content=content,
                columns=COLUMNS,
            )
        )
        for line in bad:
            loop.note(f"left out: {line}")
        state = loop.restore(fresh)

        def step(number: int, state: State) -> tuple[State, Mapping]:
            return update(state, answerer.params, loop.batch(number), jnp.int32(number))

        if not loop.is_done and not loop.run(state, step):
            return False
        folders.save(Path(run_dir) / folders.IN_RUN, sizes, loop.state.params, answerer)
        loop.note(f"the encoder is in {Path(run_dir) / folders.IN_RUN}")
    return True


def initial(config: StreamingTraining, sizes: StreamingConfig, answerer: Answerer) -> tuple[nnx.GraphDef, dict]:
    """A fresh encoder, or that of stage clip. Raises ValueError where that one has other sizes."""
    if not config.init:
        return split_params(StreamingEncoder(sizes, rngs=nnx.Rngs(config.seed)))
    found = folders.load(config.init, answerer)
    same = {"selected", "temperature", "gradient_scale"}  # what no parameter depends on
    for field in dataclasses.fields(sizes):
        there, wanted = getattr(found.config, field.name), getattr(sizes, field.name)
        if field.name not in same and there != wanted:
            raise ValueError(f"config.encoder.{field.name} is {wanted}, but that of {config.init} is {there}")
    return folders.graphdef_of(sizes)[0], found.params


def encoder_sharding(mesh: jax.sharding.Mesh, sizes: StreamingConfig) -> sharding.ParamSharding:
    """The encoder over `model` as the language model is; heads are never cut."""
    model, split = mesh.shape["model"], ["hidden"]
    if sizes.num_heads % model == 0:
        split.append("heads")
    if sizes.num_kv_heads % model == 0:
        split.append("kv_heads")
    return sharding.ParamSharding(mesh, {name: "model" for name in split})


def place(params: dict, where: sharding.ParamSharding) -> dict:
    flat = weights.flatten(params)
    return weights.unflatten({path: jax.device_put(leaf, where(path, leaf.shape)) for path, leaf in flat.items()})


def make_update(
    config: StreamingTraining,
    graphdef: nnx.GraphDef,
    answerer: Answerer,
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    rate: optax.Schedule,
    mesh: jax.sharding.Mesh,
) -> Callable:
    """(state, answerer's params, batch, step) -> (state, metrics)."""

    def loss_of(params: dict, frozen: dict, batch: QuestionBatch, step: jax.Array):
        encoder, model = merge_params(graphdef, params), merge_params(answerer.graphdef, frozen)
        features = clip_features(model, answerer.processor.normalize, batch.pixels)
        stream = encoder.encode(features, batch.times, batch.is_clip, cut_every=config.cut_every)
        key = jax.random.fold_in(jax.random.key(config.seed, impl="threefry2x32"), step)
        keys = jax.vmap(lambda index: jax.random.fold_in(key, index))(batch.index)
        noise = gumbel_noise(keys, 1, batch.is_clip.shape[1])[:, 0]
        words = model.language_model.embed_tokens(batch.words)
        chosen = encoder.select(words, batch.word_lengths, stream, batch.is_clip, noise)
        visual = encoder.visual_tokens(chosen.memories, stream.last)
        logits = answer_logits(model, visual, batch)
        answer = answer_loss(logits, batch.targets)
        selection = selection_loss(chosen.scores, batch.evidence)
        counts = batch.targets >= 0
        metrics = {
            "losses/answer": answer,
            "losses/selection": selection,
            "right": jnp.mean(jnp.all((jnp.argmax(logits, -1) == batch.targets) | ~counts, axis=-1)),
            "evidence_found": found_evidence(chosen.picks, batch.evidence),
        }
        return answer + schedule.weight(step) * selection, metrics

    def update(state: State, frozen: dict, batch: QuestionBatch, step: jax.Array) -> tuple[State, Mapping]:
        with attention.computed_by(config.answerer.attention, mesh):
            (loss, metrics), gradient = jax.value_and_grad(loss_of, has_aux=True)(state.params, frozen, batch, step)
        changes, moments = optimizer.update(gradient, state.moments, state.params)
        metrics |= {"loss": loss, "grad_norm": optax.global_norm(gradient), "learning_rate": rate(step)}
        return State(optax.apply_updates(state.params, changes), moments), metrics

    return update


def clip_features(model, normalize: Callable[[jax.Array], jax.Array], pixels: jax.Array) -> jax.Array:
    """Frames uint8 [B, K, T, S, S, 3] -> their visual tokens [B, K, T, s * s, W], clip by clip, without gradients."""

    def of_clip(frames):
        tokens = model.encode_frames(normalize(frames.reshape(-1, *frames.shape[2:])))
        return jax.lax.stop_gradient(tokens.reshape(*frames.shape[:2], -1, tokens.shape[-1]))

    return jax.lax.map(of_clip, pixels.swapaxes(0, 1)).swapaxes(0, 1)


def answer_logits(model, visual: jax.Array, batch: QuestionBatch) -> jax.Array:
    """Logits [B, A, V] that predict the answer's tokens, from memories [B, M, W] in the place of the video."""
    text = model.language_model.embed_tokens(jnp.maximum(batch.ids, 0))
    x = splice(text, visual[:, None].astype(text.dtype), batch.ids)
    hidden, _ = model.language_model(x, jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2]))
    first = batch.lengths + visual.shape[1] - 2  # the prompt's last token, the video being M tokens for one
    places = first[:, None] + jnp.arange(batch.targets.shape[1])
    return model.language_model.logits(jnp.take_along_axis(hidden, places[..., None], axis=1))
