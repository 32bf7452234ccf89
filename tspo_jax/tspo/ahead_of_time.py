"""The programs of a training step at full size, compiled for TPU slices that are not there, without weights."""

import dataclasses
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from tspo_jax.answering import prompts, shapes
from tspo_jax.answering.rollout import Rollout
from tspo_jax.checkpoints import weights
from tspo_jax.checkpoints.architectures import read_architecture, shallow
from tspo_jax.checkpoints.folders import AGENT_KINDS, Architecture, Generation, answerer_architecture, clip_config
from tspo_jax.config import Config
from tspo_jax.devices import chips, sharding
from tspo_jax.devices.compiling import Call, Step
from tspo_jax.models.layers import abstract_module
from tspo_jax.models.video_prompt import FrameTimes
from tspo_jax.tspo import programs
from tspo_jax.tspo.environment import num_chunks
from tspo_jax.tspo.programs import TrainState

PROMPT_TOKENS = 256  # of a question with its options, padded
FRAME_SIZE = (720, 1280)  # height and width of a frame as it comes from a video


def training_step(config: Config, answerer: Architecture, clip_width: int, mesh: jax.sharding.Mesh) -> dict[str, Call]:
    """The programs of one step on needle samples of the longest bucket, which are the largest."""
    p, K = config.policy, config.data.specific.k
    B, T, G = config.batch_size, max(config.data.buckets), p.group_size
    rows, everywhere = sharding.over_questions(mesh), sharding.replicated(mesh)

    def of(where, *shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    def put(tree):
        return jax.tree.map(lambda x: of(everywhere, *x.shape, dtype=x.dtype), tree)

    a = config.agent
    graphdef, agent = abstract_module(
        lambda rngs: AGENT_KINDS[a.kind](clip_width, num_heads=a.num_heads, window=a.window, rngs=rngs)
    )
    optimizer = jax.eval_shape(programs.make_optimizer(config).init, agent)
    state = put(TrainState(agent, optimizer, agent if p.stale_steps else None))
    initial = state.agent if p.kl or p.kl_limit else None
    batch = {
        "index": of(rows, B, dtype=jnp.int32),
        "features": of(rows, B, T, clip_width),
        "text": of(rows, B, clip_width),
        "mask": of(rows, B, T, dtype=bool),
    }
    step = of(everywhere, dtype=jnp.int32)
    measured = {name: of(rows, B, G) for name in ("total", "accuracy", "location", "unparsed")}
    measured["unique_frames"] = of(rows, B)

    where = answerer_where(config, answerer, mesh)
    dtype = jnp.dtype(config.answerer.dtype)
    params = weights.unflatten(
        {
            path: of(where(path, x.shape), *x.shape, dtype=dtype)
            for path, x in weights.flatten(answerer.abstract).items()
        }
    )
    rollout = Rollout(
        answerer.graphdef,
        answerer.processor.normalize,
        Generation((0,), 0, 1.0),
        max_new_tokens=config.answerer.max_new_tokens,
        encode_chunk=config.answerer.encode_chunk,
        prefill_chunk=config.answerer.prefill_chunk,
        mesh=mesh,
        attention=config.answerer.attention,
        float32_precision=config.answerer.float32_precision,
    )
    chunks = num_chunks(config, mesh)
    b = B // chunks  # questions that are answered at a time
    size = answerer.processor.for_frames(K).size_of(*FRAME_SIZE)
    frames = of(rows, b, G * K, *size, 3, dtype=jnp.uint8)
    index = of(rows, b, G, K, dtype=jnp.int32)
    times = times_of_a_set(config)
    ids = of(rows, b, G, prompt_tokens(answerer, times), dtype=jnp.int32)
    lengths = of(rows, b, G, dtype=jnp.int32)
    steps = answerer.config.time_steps(times)
    steps = None if steps is None else of(rows, b, G, len(steps), dtype=jnp.int32)
    draws = of(rows, B, G, K, dtype=jnp.int32)
    trips = {"encode": -(-G * K // config.answerer.encode_chunk), "decode": config.answerer.max_new_tokens - 1}
    update = programs.make_update(graphdef, config, mesh)
    return {
        "sample": Call(programs.make_sample(graphdef, config, mesh), (state.agent, batch, step), {"k": K}, {}),
        "answer": Call(rollout.program, (params, frames, index, ids, lengths, None, steps), {}, trips, chunks),
        "update": Call(update, (state, batch, draws, measured, step, initial), {}, {}),
    }


def times_of_a_set(config: Config) -> FrameTimes:
    """Times with as many digits as any."""
    T = float(max(config.data.buckets))
    return FrameTimes.of([T] * config.data.specific.k, T)


def prompt_tokens(answerer: Architecture, times: FrameTimes) -> int:
    """Tokens of a padded prompt, each place of visual tokens being one, for frames of these times. Without a tokenizer
    the words that tell the times are counted: a marker, a word, a digit and any other character are a token each."""
    question = prompts.render("?", answerer.template)
    told = answerer.config.write_times(question, times)
    words = [len(re.findall(r"<\|\w+\|>|<image>|\d| ?[A-Za-z]+|[^\w\s]", text)) for text in (question, told)]
    return -(-(PROMPT_TOKENS + words[1] - words[0]) // shapes.MULTIPLE) * shapes.MULTIPLE


def least_bytes_of_token(config: Config, answerer: Architecture, mesh: jax.sharding.Mesh) -> int:
    """Bytes of a device that decoding one token of each prompt of `answer` must read: the language model's weights (of
    a table of embeddings of its own nothing but a few rows) and the prompts' keys and values."""
    language, K = answerer.config.language, config.data.specific.k
    tied = language.tie_word_embeddings
    where, dtype = answerer_where(config, answerer, mesh), jnp.dtype(config.answerer.dtype)
    weight = sum(
        math.prod(where(path, x.shape).shard_shape(x.shape))
        for path, x in weights.flatten(answerer.abstract).items()
        if path.startswith("language_model") and (tied or "embed_tokens" not in path)
    )
    frame = answerer.processor.for_frames(K).size_of(*FRAME_SIZE)
    visual = answerer.config.num_visual_tokens(K, *frame)
    tokens = visual + prompt_tokens(answerer, times_of_a_set(config))
    prompts_here = config.batch_size // num_chunks(config, mesh) * config.policy.group_size // mesh.shape["data"]
    heads = max(1, language.num_key_value_heads // mesh.shape["model"])
    cache = 2 * language.num_hidden_layers * prompts_here * heads * tokens * language.head_dim
    return dtype.itemsize * (weight + cache)


def answerer_where(config: Config, answerer: Architecture, mesh: jax.sharding.Mesh) -> sharding.ParamSharding:
    heads = dataclasses.asdict(answerer.config.language)
    return sharding.answerer_sharding(mesh, heads, split_over_data=config.mesh.split_over_data)


def step_on(config: Config, answerer: Architecture, clip_width: int, topology: str) -> Step:
    """The programs of a step on one topology.

    A batch that cannot be dealt out evenly to the `data` axis is rounded up: such a slice trains on larger batches.
    """
    chip, devices = chips.slice_devices(topology)
    mesh = sharding.make_mesh(config.mesh.axes, devices)
    data = mesh.shape["data"]
    config = dataclasses.replace(config, batch_size=math.ceil(config.batch_size / data) * data)
    calls = training_step(config, answerer, clip_width, mesh)
    token = least_bytes_of_token(config, answerer, mesh)
    return Step.on(topology, chip, mesh, calls, batch_size=config.batch_size, token_bytes=token)


def compile_step(config: Config, answerer: Architecture, clip_width: int, topology: str) -> dict[str, Any]:
    """Compiles all programs of `step_on`."""
    step = step_on(config, answerer, clip_width, topology)
    result = step.compile()
    if result["fits"]:
        programs = result["programs"].items()
        return result | {"seconds": sum(step.calls[name].times * program["seconds"] for name, program in programs)}
    config = dataclasses.replace(config, batch_size=result["batch_size"])
    return result | {"advice": advice(config, answerer, step.mesh)}


def advice(config: Config, answerer: Architecture, mesh: jax.sharding.Mesh) -> list[str]:
    """What takes less memory, the cheapest first."""
    a, model, heads = config.answerer, mesh.shape["model"], answerer.config.language.num_key_value_heads
    larger = [n for n in range(model + 1, heads + 1) if heads % n == 0 and mesh.size % n == 0]
    options = [
        (a.prefill_chunk != 1, "--config.answerer.prefill_chunk=1 (frame sets of a question at a time)"),
        (a.encode_chunk > 4, "--config.answerer.encode_chunk=4 (frames of a question at a time)"),
        (num_chunks(config, mesh) < config.batch_size // mesh.shape["data"], "--config.answerer.question_chunk=1"),
        (bool(larger), f"a model axis of {larger[0] if larger else 0} in --config.mesh.axes"),
        (config.batch_size > mesh.shape["data"], f"--config.batch_size={mesh.shape['data']}"),
        (not config.mesh.split_over_data and mesh.shape["data"] > 1, "--config.mesh.split_over_data=True"),
    ]
    return [text for is_possible, text in options if is_possible] or ["a slice with more or larger chips"]


def compile_config(
    config: Config, descriptions: Path, topologies: Sequence[str], num_layers: int = 0, note=lambda text: None
) -> list[dict[str, Any]]:
    """`compile_step` of a config on each topology; `note` is called with the name of the one that begins."""
    models = read_models(config, descriptions, num_layers)
    results = []
    for topology in topologies:
        note(topology)
        results.append(compile_step(config, *models, topology))
    return results


def read_models(config: Config, descriptions: Path, num_layers: int = 0) -> tuple[Architecture, int]:
    """The answerer of a config, cut to `num_layers` layers if not 0, and the width of its CLIP's features."""
    description, path = read_architecture(config.answerer.folder, descriptions)
    if num_layers:
        description = shallow(description, num_layers)
    answerer = answerer_architecture(description, path, video=config.answerer.video)
    return answerer, clip_config(*read_architecture(config.agent.clip, descriptions)).projection_dim
