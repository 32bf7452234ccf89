"""The update of preference training at full size, compiled for TPU slices that are not there, without weights."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from tspo_jax.checkpoints import adapters, weights
from tspo_jax.checkpoints.architectures import read_architecture, shallow
from tspo_jax.checkpoints.folders import Architecture, answerer_architecture
from tspo_jax.devices import chips, sharding
from tspo_jax.devices.compiling import Call, Step
from tspo_jax.tpo import programs, training
from tspo_jax.tpo.batches import TOKEN_MULTIPLE
from tspo_jax.tpo.config import TpoConfig
from tspo_jax.tpo.losses import Objective
from tspo_jax.tpo.programs import Model, Pairs, State
from tspo_jax.tpo.trained import lora_of

TEXT_TOKENS = 256  # of a question with its options
FRAME_SIZE = (720, 1280)  # height and width of a frame as it comes from a video


def training_step(config: TpoConfig, answerer: Architecture, mesh: jax.sharding.Mesh) -> dict[str, Call]:
    """The update, with answers of the middle bucket, and the program that computes a reference that is stored."""
    a, rows = config.answerer, sharding.over_questions(mesh)
    heads = dataclasses.asdict(answerer.config.language)
    split = config.mesh.split_over_data or config.full
    where = sharding.answerer_sharding(mesh, heads, split_over_data=split)

    def placed(tree: dict, dtype) -> dict:
        leaves = weights.flatten(tree)
        return weights.unflatten(
            {path: jax.ShapeDtypeStruct(x.shape, dtype, sharding=where(path, x.shape)) for path, x in leaves.items()}
        )

    graphdef, dtype = answerer.graphdef, jnp.dtype(a.dtype)
    if config.full:
        trained, frozen = programs.partition(answerer.abstract, lora=False)
    else:
        graphdef, trained = adapters.add(graphdef, answerer.abstract, lora_of(config))
        frozen = answerer.abstract
    trained, frozen = placed(trained, jnp.float32), placed(frozen, dtype)
    optimizer = training.make_optimizer(config, training.learning_rates(config))
    places = sharding.optimizer_sharding(optimizer, trained, mesh)
    moments = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        jax.eval_shape(optimizer.init, trained),
        places,
    )
    state = State(trained, moments)
    model = Model(graphdef, answerer.processor.normalize, dtype, a.encode_chunk, mesh, a.attention)
    update = programs.make_update(
        model,
        Objective(**vars(config.preference)),
        optimizer,
        accumulate=config.accumulate,
        online_reference=config.is_online,
        shardings=jax.tree.map(lambda x: x.sharding, state),
    )
    pairs = abstract_pairs(config, answerer, config.batch_size, rows)
    calls = {"update": Call(update, (state, frozen, pairs), {}, {})}
    if not config.is_online:
        part = abstract_pairs(config, answerer, config.batch_size // config.accumulate, rows)
        params = placed(answerer.abstract, dtype)
        calls["reference"] = Call(programs.make_reference(model), (params, part), {}, {})
    return calls


def abstract_pairs(config: TpoConfig, answerer: Architecture, count: int, where) -> Pairs:
    """A batch of `count` pairs as shapes."""
    K, bucket = config.data.num_frames, config.data.answer_buckets[len(config.data.answer_buckets) // 2]
    size = answerer.processor.for_frames(K).size_of(*FRAME_SIZE)
    visual = answerer.config.num_visual_tokens(K, *size)
    tokens = math.ceil((TEXT_TOKENS + visual) / TOKEN_MULTIPLE) * TOKEN_MULTIPLE - visual + 1

    def of(*shape, dtype=jnp.int32):
        return jax.ShapeDtypeStruct((count, *shape), dtype, sharding=where)

    return Pairs(
        of(K, *size, 3, dtype=jnp.uint8),
        of(tokens),
        of(),
        of(2, bucket),
        of(2),
        of(dtype=jnp.float32),
        of(2, dtype=jnp.float32),
    )


def step_on(config: TpoConfig, answerer: Architecture, topology: str) -> Step:
    """The programs for one topology, with as many parts of a batch as give each `data` row one pair at a time, where
    config.accumulate gives fewer."""
    chip, devices = chips.slice_devices(topology)
    mesh = sharding.make_mesh(config.mesh.axes, devices)
    config = dataclasses.replace(config, accumulate=config.batch_size // mesh.shape["data"])
    return Step.on(
        topology,
        chip,
        mesh,
        training_step(config, answerer, mesh),
        batch_size=config.batch_size,
        frames=config.data.num_frames,
        trained="full" if config.full else f"LoRA r {config.lora.r}",
    )


def compile_step(config: TpoConfig, answerer: Architecture, topology: str) -> dict[str, Any]:
    """Compiles the programs of `step_on`."""
    step = step_on(config, answerer, topology)
    result = step.compile()
    if result["fits"]:
        return result | {"seconds": result["programs"]["update"]["seconds"]}
    data = step.mesh.shape["data"]
    options = [
        (config.full, "adapters instead of the whole model (--config.full=False)"),
        (True, "--config.data.num_frames smaller"),
        (config.answerer.encode_chunk > 4, "--config.answerer.encode_chunk=4"),
        (not config.full and not config.mesh.split_over_data and data > 1, "--config.mesh.split_over_data=True"),
    ]
    return result | {"advice": [text for is_possible, text in options if is_possible]}


def compile_config(
    config: TpoConfig,
    descriptions: Path,
    topologies: Sequence[str],
    num_layers: int = 0,
    note: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:
    """`compile_step` of a config on each topology; `note` is called with the name of the one that begins."""
    answerer = read_answerer(config, descriptions, num_layers)
    results = []
    for topology in topologies:
        note(topology)
        results.append(compile_step(config, answerer, topology))
    return results


def read_answerer(config: TpoConfig, descriptions: Path, num_layers: int = 0) -> Architecture:
    """The answerer of a config, cut to `num_layers` layers if not 0."""
    description, path = read_architecture(config.answerer.folder, descriptions)
    if num_layers:
        description = shallow(description, num_layers)
    return answerer_architecture(description, path, video=config.answerer.video)
