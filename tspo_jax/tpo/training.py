"""A run of preference training on the shared loop: what is loaded, a step, an evaluation."""

import math
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from tspo_jax.checkpoints import adapters, weights
from tspo_jax.checkpoints.folders import Answerer, load_answerer
from tspo_jax.data import overlap
from tspo_jax.data.frame_store import FrameStore
from tspo_jax.devices import sharding
from tspo_jax.models.layers import merge_params
from tspo_jax.runs.loop import Batches, Loop
from tspo_jax.tpo import pairs, programs, reference
from tspo_jax.tpo.batches import PairBatches
from tspo_jax.tpo.config import MAY_DIFFER, TpoConfig
from tspo_jax.tpo.held_out import HeldOutPairs
from tspo_jax.tpo.losses import Objective
from tspo_jax.tpo.programs import Model, State
from tspo_jax.tpo.trained import lora_of

COLUMNS = {  # of the table on the terminal: metric -> heading
    "step": "step",
    "loss": "loss",
    "losses/dpo": "dpo",
    "losses/sft": "sft",
    "rewards/accuracies": "right",
    "rewards/margins": "margin",
    "logps/chosen": "chosen",
    "logps/rejected": "rejected",
    "grad_norm": "gradient",
    "learning_rate": "rate",
    "seconds/data": "data",
    "seconds/update": "update",
    "compilations": "programs",
}
LOSS_NOTE = (
    "Policy and reference are equal at first: the preference loss starts at log 2, rewards and margins at 0, and so "
    "does rewards/accuracies, which counts strictly larger rewards only."
)
MODEL_PARTS = ("tower", "project", "angles")  # that a model needs besides what answering needs


def train(config: TpoConfig, run_dir: Path, devices: Sequence[jax.Device]) -> bool:
    """Trains on these devices until `config.num_steps` updates are done, from the newest checkpoint of `run_dir` if it
    has one. Returns False where SIGTERM stopped it before; then the last step is saved."""
    mesh = sharding.make_mesh(config.mesh.axes, devices)
    sharding.check_batch_size(mesh, config.batch_size // config.accumulate, "batch_size / accumulate")
    objective = Objective(**vars(config.preference)).check()
    rates = learning_rates(config)
    read, bad = pairs.read_pairs(config.data.pairs, config.data.strict, config.data.max_bad)
    held_out, bad_held_out, in_both = [], [], []
    if config.held_out.every:
        if not config.data.held_out:
            raise ValueError("config.held_out.every is set, but config.data.held_out names no pairs")
        held_out, bad_held_out = pairs.read_pairs(config.data.held_out, config.data.strict, config.data.max_bad)
        in_both = overlap.shared(*([(pair.video, pair.prompt) for pair in some] for some in (read, held_out)))
        places = np.linspace(0, len(held_out), min(len(held_out), config.held_out.num_pairs), endpoint=False)
        held_out = [held_out[int(place)] for place in places]

    a = config.answerer
    if a.adapter:
        raise ValueError(
            f"config.answerer.adapter is {a.adapter}: training starts from whole weights; merge it first "
            "(python -m tspo_jax.export --merge) and name the merged folder as config.answerer.folder"
        )
    where = sharding.answerer_sharding(
        mesh, weights.read_config(a.folder), split_over_data=config.mesh.split_over_data or config.full
    )
    # Master weights are float32 where they are trained.
    answerer = load_answerer(a.folder, jnp.float32 if config.full else jnp.dtype(a.dtype), where, a.video)
    check_model(answerer)
    graphdef, trained, frozen = trained_parts(config, answerer, where)
    model = Model(graphdef, answerer.processor.normalize, jnp.dtype(a.dtype), a.encode_chunk, mesh, a.attention)
    optimizer = make_optimizer(config, rates)
    places = sharding.optimizer_sharding(optimizer, trained, mesh)
    state = State(trained, jax.jit(optimizer.init, out_shardings=places)(trained))
    where_state = jax.tree.map(lambda x: x.sharding, state)
    check_disk(config, run_dir, state)
    update = programs.make_update(
        model,
        objective,
        optimizer,
        accumulate=config.accumulate,
        online_reference=config.is_online,
        shardings=where_state,
    )
    log_probs = programs.make_evaluation(model, online_reference=config.is_online)

    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(config.data.decode_threads))
        store = FrameStore(config.data.store)
        share = sharding.data_slice(mesh)
        batches = PairBatches(config, read, config.data.pairs, answerer, store, pool, share)
        asked = PairBatches(config, held_out, config.data.held_out, answerer, store, pool, share) if held_out else None
        check = partial(check_first_step, config)
        content = {
            "data.pairs": pairs.pairs_sha256(batches.pairs),
            "data.store": store.frames_sha256(video for pair in batches.pairs for video, _ in batches.shown(pair)),
            "answerer.folder": weights.checkpoint_identity(a.folder),
        }
        loop = Loop(
            run_dir,
            config,
            Batches(batches.endless),
            put=partial(sharding.put_batch, mesh),
            shape_of=lambda step, batch: batch.answers.shape,
            may_differ=MAY_DIFFER,
            content=content,
            setting=pairs.pairs_sha256(asked.pairs) if asked else "",
            columns=COLUMNS,
            report=check,
        )
        stack.enter_context(loop)
        for line in [*bad, *bad_held_out, *batches.left_out, *(asked.left_out if asked else ())]:
            loop.note(f"left out: {line}")
        if not config.is_online:
            path = Path(config.reference.file or run_dir / "reference.jsonl")
            path.parent.mkdir(parents=True, exist_ok=True)
            compute = programs.make_reference(model)

            def of_reference(rows):
                params = trained if config.full else programs.without_adapters(trained)
                return compute(model.params(params, frozen), rows)

            for some in filter(None, (batches, asked)):
                reference.fill(path, config, answerer, some, of_reference, mesh, loop.note)
        state = loop.restore(state)
        if loop.is_done:
            return True
        if not loop.start:
            loop.note(LOSS_NOTE)
            for line in in_both:
                loop.note(f"note: {line}")
            share_right = pairs.length_only_accuracy(batches.answer_lengths.tolist())
            loop.note(f"{len(batches)} pairs; the lengths of the answers alone rank {share_right:.1%} of them right")
        evaluation = asked and HeldOutPairs(config, asked, log_probs, objective, model, answerer, frozen)

        def step(number: int, state: State) -> tuple[State, Mapping]:
            rows = loop.batch(number)
            state, metrics = update(state, frozen, rows)
            return state, metrics | {"learning_rate": jnp.float32(rates(number))}

        return loop.run(state, step, evaluation, config.held_out.every)


def learning_rates(config: TpoConfig) -> optax.Schedule:
    """Raises ValueError where the rate would be 0 at every step."""
    o = config.optimizer
    warmup = math.ceil(o.warmup * config.num_steps)
    return programs.learning_rates(o.full_rate if config.full else o.lora_rate, config.num_steps, warmup)


def make_optimizer(config: TpoConfig, rates: optax.Schedule) -> optax.GradientTransformation:
    o = config.optimizer
    return programs.make_optimizer(
        rates, max_grad_norm=o.max_grad_norm, b1=o.b1, b2=o.b2, eps=o.eps, weight_decay=o.weight_decay
    )


def trained_parts(config: TpoConfig, answerer: Answerer, where) -> tuple[nnx.GraphDef, dict, dict]:
    """The model's structure, with adapters unless it is trained in full; what is trained, and what is frozen."""
    if config.full:
        trained, frozen = programs.partition(answerer.params, lora=False)
        dtype = jnp.dtype(config.answerer.dtype)
        return answerer.graphdef, trained, jax.tree.map(lambda x: x.astype(dtype), frozen)
    graphdef, abstract = adapters.add(answerer.graphdef, answerer.params, lora_of(config))
    return graphdef, adapters.fresh(abstract, config.seed, where), answerer.params


def check_model(answerer: Answerer) -> None:
    """Raises ValueError for a Video-MLLM whose class cannot be trained."""
    kind = type(merge_params(answerer.graphdef, answerer.params))
    if missing := [name for name in MODEL_PARTS if not hasattr(kind, name)]:
        raise ValueError(f"{answerer.folder}: {kind.__name__} cannot be trained: it has no {', '.join(missing)}")


def check_disk(config: TpoConfig, run_dir: Path, state: State) -> None:
    """Raises ValueError where the checkpoints of the run do not fit on its disk."""
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    copies = config.keep_checkpoints + 1 + bool(config.held_out.every)  # one is written before another one goes
    there = next(folder for folder in (run_dir, *run_dir.absolute().parents) if folder.exists())
    free = shutil.disk_usage(there).free
    kept = sum(file.stat().st_size for file in run_dir.glob("checkpoints/**/*") if file.is_file())
    if size * copies > free + kept:
        best = ", the best one" if config.held_out.every else ""
        raise ValueError(
            f"{run_dir}: {copies} checkpoints of {size / 2**30:.1f} GiB (keep_checkpoints={config.keep_checkpoints}, "
            f"one being written{best}) need {size * copies / 2**30:.1f} GiB, but {(free + kept) / 2**30:.1f} GiB are "
            "free"
        )


def check_first_step(config: TpoConfig, row: Mapping[str, float]) -> None:
    """Raises ValueError where policy and reference, which are the same model at the first step, differ there."""
    if row["step"] != 1 or "logps/chosen" not in row:
        return
    tolerance = config.reference.tolerance or (0.05 if config.answerer.dtype == "bfloat16" else 1e-3)
    for name in ("chosen", "rejected"):
        apart = abs(row[f"logps/{name}"] - row[f"ref_logps/{name}"]) / max(row[f"tokens/{name}"], 1)
        if apart > tolerance:
            raise ValueError(
                f"the rewards are not 0 at the first step: log-probabilities of the {name} answers differ from the "
                f"reference by {apart:.3g} a token, more than {tolerance:g} (config.reference.tolerance). The "
                "reference is of other weights, frames or prompts"
            )
