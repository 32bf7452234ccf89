"""A run of retriever training on the shared loop: the contrastive and the matching loss of TESTA (BLIP's).

Videos and captions that belong together shall have like features (contrast), and the head that reads both shall tell
them from the pairs that the features take for like (matching).
"""

import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tspo_jax.checkpoints.testa_folders import TestaModel, load_testa, save_testa
from tspo_jax.data.caption_files import drawn, examples_sha256, frames_of, read_examples
from tspo_jax.data.frame_store import FrameStore, check_side
from tspo_jax.devices import sharding
from tspo_jax.models.layers import merge_params
from tspo_jax.models.testa import unit
from tspo_jax.retrieval.config import MAY_DIFFER, RetrievalConfig
from tspo_jax.retrieval.embeddings import evenly
from tspo_jax.runs.loop import fit

TEMPERATURES = 0.001, 0.5  # between which the learned temperature is kept
QUEUES = "videos", "texts", "of"  # features of earlier batches, and their videos
COLUMNS = {
    "step": "step",
    "loss": "loss",
    "loss/contrast": "contrast",
    "loss/matching": "matching",
    "recall": "right",
    "temperature": "temperature",
    "seconds/data": "data",
    "seconds/update": "update",
}


class Batch(NamedTuple):
    """B captions with their videos: frames uint8 [B, T, S, S, 3]; ids int32 [B, N] behind [CLS], the same behind [ENC];
    their mask; and the video's number int32 [B], equal where it is the same."""

    frames: np.ndarray
    ids: np.ndarray
    joint_ids: np.ndarray
    mask: np.ndarray
    video: np.ndarray


class VideoBatches:
    """Endless batches of this process. Raises ValueError for captions that the store has no frames for."""

    def __init__(
        self,
        config: RetrievalConfig,
        model: TestaModel,
        store: FrameStore,
        pool: Executor,
        share: tuple[int, int] = (0, 1),
    ):
        self._config, self._model, self._store, self._pool, self._share = config, model, store, pool, share
        check_side(store.folder, store.settings, model.processor.size)
        self.examples = read_examples(config.data.captions)
        for example in self.examples:
            frames_of(example, store)
        if len({example.video for example in self.examples}) < 2:
            raise ValueError(f"{config.data.captions}: captions of one video alone; nothing is to be told apart")

    def start(self, first: int) -> Iterator[Batch]:
        while True:
            yield self.batch(first)
            first += 1

    def batch(self, number: int) -> Batch:
        index, count = self._share
        B, n = self._config.batch_size, len(self.examples)
        order = [drawn(self._config.seed, number * B + i, n) for i in range(B)][index::count]
        texts = [self.examples[i].caption for i in order]
        ids, mask = self._model.token_ids(texts, "[CLS]")
        joint, _ = self._model.token_ids(texts, "[ENC]")
        frames = np.stack(list(self._pool.map(self._frames, order)))
        numbers = [zlib.crc32(self.examples[i].video.encode()) & 0x7FFFFFFF for i in order]
        return Batch(frames, ids, joint, mask, np.array(numbers, np.int32))

    def _frames(self, i: int) -> np.ndarray:
        example = self.examples[i]
        places = evenly(frames_of(example, self._store), self._model.num_frames)
        return np.stack([self._model.processor.crop(frame) for frame in self._store.frames(example.video, places)])


def first_state(config: RetrievalConfig, model: TestaModel, optimizer: optax.GradientTransformation) -> dict:
    """Parameters, their slow copy, the optimiser's moments, and the queues, where there are any (Orbax saves no empty
    array): random directions of no video at first."""
    state = {
        "params": model.params,
        "slow": jax.tree.map(jnp.copy, model.params),
        "moments": optimizer.init(model.params),
    }
    if size := config.contrast.queue:
        keys = jax.random.split(jax.random.key(config.seed), 2)
        queues = (unit(jax.random.normal(key, (size, model.width))) for key in keys)
        state |= dict(zip(QUEUES, (*queues, jnp.full(size, -1, jnp.int32)), strict=True))
    return state


def contrast_loss(features, slow, queued, video, of, temperature, alpha):
    """The mean of video-to-text and text-to-video.

    Args:
      features, slow: pairs (videos, texts) of unit vectors [B, E], of the model and of its slow copy.
      queued: pair of unit vectors [Q, E], of earlier batches; `of` int [Q], their videos.
      video: int [B].
      alpha: weight of the slow copy's judgement in the targets; the rest is spread over the pairs of the same video.
    """
    everyone = [jnp.concatenate(pair) for pair in zip(slow, queued, strict=True)]  # videos, texts
    same = (video[:, None] == jnp.concatenate([video, of])).astype(jnp.float32)
    same = same / same.sum(1, keepdims=True)

    def one_way(from_, slow_from, to):
        judged = jax.nn.softmax(slow_from @ to.T / temperature)
        targets = jax.lax.stop_gradient(alpha * judged + (1 - alpha) * same)
        return -(jax.nn.log_softmax(from_ @ to.T / temperature) * targets).sum(1).mean()

    return (one_way(features[0], slow[0], everyone[1]) + one_way(features[1], slow[1], everyone[0])) / 2


def matching_loss(model, tokens, batch: Batch, similarity, key):
    """Cross-entropy over B pairs that belong together and 2 B that do not, drawn by how like their features are.

    similarity: [B, B] of videos to texts, divided by the temperature.
    """
    other = batch.video[:, None] != batch.video
    keys = jax.random.split(key)
    # A row without another video has nothing to draw from: any other caption then.
    weights = jnp.where(other, jax.lax.stop_gradient(similarity), -1e9)
    text = jax.random.categorical(keys[0], weights)  # a wrong text for each video
    video = jax.random.categorical(keys[1], weights.T)  # a wrong video for each text
    right = model.matching_logits(tokens, batch.joint_ids, batch.mask)
    wrong_text = model.matching_logits(tokens, batch.joint_ids[text], batch.mask[text])
    wrong_video = model.matching_logits(tokens[video], batch.joint_ids, batch.mask)
    B = len(tokens)
    labels = jnp.repeat(jnp.array([1, 0, 0]), B)
    logits = jnp.concatenate([right, wrong_text, wrong_video])
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def make_update(config: RetrievalConfig, model: TestaModel, optimizer: optax.GradientTransformation) -> Callable:
    """(step, state, batch) -> (state, metrics), compiled; the old state is donated."""
    c = config.contrast

    def features(params, batch):
        network = merge_params(model.graphdef, params)
        tokens = network.video_tokens(model.processor.normalize(batch.frames))
        return network, tokens, (network.video_features(tokens), network.text_features(batch.ids, batch.mask))

    @partial(jax.jit, donate_argnums=1)
    def update(step, state, batch):
        key = jax.random.fold_in(jax.random.key(config.seed), step)
        alpha = c.alpha * jnp.minimum(1.0, step / max(c.ramp * config.num_steps, 1.0))
        slow_params = jax.tree.map(lambda s, p: c.momentum * s + (1 - c.momentum) * p, state["slow"], state["params"])
        _, _, slow = features(slow_params, batch)
        this_batch = dict(zip(QUEUES, (*slow, batch.video), strict=True))
        queues = {name: state.get(name, x[:0]) for name, x in this_batch.items()}

        def loss(params):
            network, tokens, fast = features(params, batch)
            temperature = jnp.clip(params["temp"], *TEMPERATURES)
            queued = queues["videos"], queues["texts"]
            contrast = contrast_loss(fast, slow, queued, batch.video, queues["of"], temperature, alpha)
            similarity = fast[0] @ fast[1].T
            matching = matching_loss(network, tokens, batch, similarity / temperature, key)
            best = batch.video[similarity.argmax(0)] == batch.video  # the video that each text finds
            metrics = {"loss/contrast": contrast, "loss/matching": matching, "recall": best.mean()}
            return contrast + matching, metrics | {"temperature": temperature}

        (total, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(state["params"])
        changes, moments = optimizer.update(gradient, state["moments"], state["params"])
        new = {"params": optax.apply_updates(state["params"], changes), "slow": slow_params, "moments": moments}
        if c.queue:
            new |= {name: jnp.concatenate([x, queues[name]])[: c.queue] for name, x in this_batch.items()}
        return new, metrics | {"loss": total, "grad_norm": optax.global_norm(gradient)}

    return update


def make_optimizer(config: RetrievalConfig) -> optax.GradientTransformation:
    o = config.optimizer
    rates = optax.cosine_decay_schedule(o.learning_rate, config.num_steps)
    adamw = optax.adamw(rates, weight_decay=o.weight_decay)
    return optax.chain(optax.clip_by_global_norm(o.max_grad_norm), adamw) if o.max_grad_norm else adamw


def train(config: RetrievalConfig, run_dir: Path, devices: Sequence[jax.Device]) -> bool:
    """Trains until `config.num_steps` updates are done; then RUN_DIR/retriever is a folder that retrieve takes. Returns
    False where SIGTERM stopped it before."""
    mesh = sharding.make_mesh(config.mesh.axes, devices)
    sharding.check_batch_size(mesh, config.batch_size)
    model = load_testa(config.model, num_frames=config.num_frames or None, testa_r=config.testa_r or None)
    if not model.width:
        raise ValueError(f"config.model: {config.model} answers questions only, it has no features to compare")
    optimizer = make_optimizer(config)
    with ThreadPoolExecutor(config.data.decode_threads) as pool:
        store = FrameStore(config.data.store)
        batches = VideoBatches(config, model, store, pool, sharding.data_slice(mesh))
        content = {
            "data.captions": examples_sha256(batches.examples),
            "data.store": store.frames_sha256(example.video for example in batches.examples),
            "model": model.identity,
        }
        is_done, newest = fit(
            run_dir,
            config,
            batches.start,
            sharding.put_replicated(mesh, first_state(config, model, optimizer)),
            make_update(config, model, optimizer),
            put=partial(sharding.put_batch, mesh),
            may_differ=MAY_DIFFER,
            content=content,
            columns=COLUMNS,
        )
        if is_done and jax.process_index() == 0:
            save_testa(Path(run_dir) / "retriever", model, newest["params"])
    return is_done
