"""A run of captioner training on the shared loop: masked words, and the sparsity of the learned mask."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import jax
import optax

from tspo_jax.captioning.config import MAY_DIFFER, CaptioningConfig
from tspo_jax.captioning.examples import NOT_HIDDEN, Batch, CaptionBatches
from tspo_jax.checkpoints.swinbert_folders import Captioner, save_captioner, start_captioner
from tspo_jax.data.caption_files import examples_sha256
from tspo_jax.data.frame_store import FrameStore
from tspo_jax.devices import sharding
from tspo_jax.models.bert_captioner import masked_loss
from tspo_jax.models.layers import merge_params
from tspo_jax.runs.loop import fit

COLUMNS = {
    "step": "step",
    "loss": "loss",
    "loss/words": "words",
    "accuracy": "right",
    "open_edges": "edges",
    "grad_norm": "gradient",
    "learning_rate": "rate",
    "seconds/data": "data",
    "seconds/update": "update",
}


def learning_rates(config: CaptioningConfig) -> optax.Schedule:
    o, steps = config.optimizer, config.num_steps
    warmup = min(round(o.warmup * steps), steps - 1)
    falling = optax.linear_schedule(o.learning_rate, 0.0, steps - warmup)
    return optax.join_schedules([optax.linear_schedule(0.0, o.learning_rate, warmup), falling], [warmup])


def make_optimizer(config: CaptioningConfig) -> optax.GradientTransformation:
    """The tower more slowly and the mask faster than the rest; weight decay of matrices only."""
    o, rates = config.optimizer, learning_rates(config)

    def adamw(factor: float, decay: float) -> optax.GradientTransformation:
        def is_matrix(params):
            return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in ("kernel", "embedding"), params)

        return optax.adamw(lambda step: factor * rates(step), weight_decay=decay, mask=is_matrix)

    parts = {
        "tower": adamw(o.swin_rate, o.weight_decay),
        "mask": adamw(config.mask.rate, 0.0),
        "rest": adamw(1.0, o.weight_decay),
    }
    names = {"swin": "tower", "learn_vid_att": "mask"}

    def labels(params):
        return {name: jax.tree.map(lambda _, name=name: names.get(name, "rest"), x) for name, x in params.items()}

    return optax.chain(optax.clip_by_global_norm(o.max_grad_norm), optax.multi_transform(parts, labels))


def loss_of(config: CaptioningConfig, captioner: Captioner, params: dict, batch: Batch, key: jax.Array | None):
    """The loss of a batch and its metrics; `key` None = without dropout."""
    model = merge_params(captioner.graphdef, params)
    dropout = config.dropout, key
    video = model.encode(model.video_tokens(captioner.processor.normalize(batch.frames)), dropout)
    logits = model.logits(model.words(batch.ids, batch.lengths, video, dropout))
    is_hidden = batch.targets != NOT_HIDDEN
    words = masked_loss(logits, batch.targets, is_hidden, config.words.smoothing)
    right = (logits.argmax(-1) == batch.targets) & is_hidden
    metrics = {"loss/words": words, "accuracy": right.sum() / is_hidden.sum()}
    loss = words
    if captioner.config.mask != "none":
        loss = words + config.mask.weight * model.sparsity()
        metrics["open_edges"] = (model.edges() >= 0.5).mean()
    return loss, metrics | {"loss": loss}


def make_update(config: CaptioningConfig, captioner: Captioner, optimizer: optax.GradientTransformation) -> Callable:
    """(step, state, batch) -> (state, metrics), compiled; the old state is donated."""
    rates = learning_rates(config)

    @partial(jax.jit, donate_argnums=1)
    def update(step, state, batch):
        key = jax.random.fold_in(jax.random.key(config.seed), step) if config.dropout else None
        loss = partial(loss_of, config, captioner, batch=batch, key=key)
        gradient, metrics = jax.grad(lambda params: loss(params), has_aux=True)(state["params"])
        changes, moments = optimizer.update(gradient, state["moments"], state["params"])
        metrics |= {"grad_norm": optax.global_norm(gradient), "learning_rate": rates(step)}
        return {"params": optax.apply_updates(state["params"], changes), "moments": moments}, metrics

    return update


def train(config: CaptioningConfig, run_dir: Path, devices: Sequence[jax.Device]) -> bool:
    """Trains until `config.num_steps` updates are done; then RUN_DIR/captioner is a folder that caption takes. Returns
    False where SIGTERM stopped it before."""
    mesh = sharding.make_mesh(config.mesh.axes, devices)
    sharding.check_batch_size(mesh, config.batch_size)
    captioner = start_captioner(config.model, mask=config.mask.kind, video_swin=config.video_swin, seed=config.seed)
    optimizer = make_optimizer(config)
    with ThreadPoolExecutor(config.data.decode_threads) as pool:
        store = FrameStore(config.data.store)
        batches = CaptionBatches(config, captioner, store, pool, sharding.data_slice(mesh))
        params = sharding.put_replicated(mesh, captioner.params)
        moments = jax.jit(optimizer.init, out_shardings=sharding.replicated(mesh))(params)
        content = {
            "data.captions": examples_sha256(batches.examples),
            "data.store": store.frames_sha256(example.video for example in batches.examples),
        }
        is_done, newest = fit(
            run_dir,
            config,
            batches.start,
            {"params": params, "moments": moments},
            make_update(config, captioner, optimizer),
            put=partial(sharding.put_batch, mesh),
            may_differ=MAY_DIFFER,
            content=content,
            columns=COLUMNS,
        )
        if is_done and jax.process_index() == 0:
            save_captioner(Path(run_dir) / "captioner", captioner, newest["params"])
    return is_done
