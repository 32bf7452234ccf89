"""Compiles the programs of a training step for TPU slices that are not there, at full size and without weights.

    python -m tspo_jax.aot_compile --config=configs/llava_video_7b.py --topology=v5e-8,v5p-8 [--output=FILE.json]

For each program (sample, answer, update; see train.py) the real TPU compiler says what a device holds and what runs on
it; loops are counted by program_cost.py, and the time is a roofline: the longest of arithmetic, memory traffic and
communication at the chip's published peaks (tpu.py), which no run can beat. Every frame set is taken to have frames of
its own and every answer to be of full length, so a real step does less.

Needs libtpu (an x86-64 Linux machine, no TPU) and the answerer's config.json: in its folder, or else in
configs/architectures/ under the folder's name. Exit status 1 where a program does not fit, with what to change.
"""

import dataclasses
import math
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import config_flags
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from tspo_jax import config as config_module
from tspo_jax.answering.rollout import Rollout
from tspo_jax.checkpoints import weights
from tspo_jax.checkpoints.folders import AGENT_KINDS, Architecture, Generation, answerer_architecture
from tspo_jax.command_line import entry_point
from tspo_jax.config import Config
from tspo_jax.devices import chips as tpu
from tspo_jax.devices import sharding
from tspo_jax.devices.program_cost import Program, arithmetic
from tspo_jax.models.clip import ClipConfig
from tspo_jax.models.layers import abstract_module
from tspo_jax.runs.run_folder import TrainState
from tspo_jax.tspo import programs
from tspo_jax.tspo.environment import num_chunks

PROMPT_TOKENS = 256  # of a question with its options, padded
FRAME = np.zeros((720, 1280, 3), np.uint8)  # a frame as it comes from a video


class Call(NamedTuple):
    """A jitted program with abstract arguments, which a step calls `times`; `while_trips`: program_cost.arithmetic."""

    program: Any
    args: tuple
    kwargs: dict
    while_trips: dict[str, int]
    times: int = 1


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
    )
    chunks = num_chunks(config, mesh)
    b = B // chunks  # questions that are answered at a time
    frames = of(rows, b, G * K, *answerer.processor.crop(FRAME).shape, dtype=jnp.uint8)
    index = of(rows, b, G, K, dtype=jnp.int32)
    prompt = of(rows, b, PROMPT_TOKENS, dtype=jnp.int32), of(rows, b, dtype=jnp.int32)
    draws = of(rows, B, G, K, dtype=jnp.int32)
    trips = {"encode": -(-G * K // config.answerer.encode_chunk), "decode": config.answerer.max_new_tokens - 1}
    update = programs.make_update(graphdef, config, mesh)
    return {
        "sample": Call(programs.make_sample(graphdef, config, mesh), (state.agent, batch, step), {"k": K}, {}),
        "answer": Call(rollout.program, (params, frames, index, *prompt), {}, trips, chunks),
        "update": Call(update, (state, batch, draws, measured, step, initial), {}, {}),
    }


def answerer_where(config: Config, answerer: Architecture, mesh: jax.sharding.Mesh) -> sharding.ParamSharding:
    heads = dataclasses.asdict(answerer.config.language)
    return sharding.answerer_sharding(mesh, heads, split_over_data=config.mesh.split_over_data)


def compile_call(call: Call, mesh: jax.sharding.Mesh, chip: tpu.Chip) -> dict[str, Any]:
    """What the compiler says about one call, as plain values: bytes and seconds, per device where not said."""
    traced = call.program.trace(*call.args, **call.kwargs)
    cost = arithmetic(traced.jaxpr, call.while_trips)
    started = time.perf_counter(), time.process_time()
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"fits": False, "reason": _memory_sentence(str(error))}
    seconds = time.perf_counter() - started[0], time.process_time() - started[1]
    memory = compiled.memory_analysis()
    program = Program(compiled.as_text(), cost.trips, mesh.size)
    roofline = {
        "arithmetic": cost.flops / mesh.size / chip.flops,
        "memory": program.hbm_bytes / chip.hbm_bandwidth,
        "communication": sum(c.wire_bytes for c in program.collectives) / chip.ici_bandwidth,
    }
    return {
        "fits": True,
        "compile_seconds": seconds[0],
        "compile_processor_seconds": seconds[1],
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "flops_all_devices": cost.flops,
        "traffic_bytes": program.hbm_bytes,
        "collectives": [
            {"kind": c.kind, "bytes": c.size, "devices": c.group, "count": c.count, "where": c.where}
            for c in program.collectives
        ],
        "roofline_seconds": roofline,
        "seconds": max(roofline.values()),
        "bound": max(roofline, key=roofline.get),
    }


def _memory_sentence(error: str) -> str:
    """The compiler's sentence about what was used of what."""
    found = re.search(r"Used [\d.]+\w? of [\d.]+\w? \w+\. Exceeded \w+ capacity by [\d.]+\w?", error)
    return found[0] if found else error.splitlines()[0]


def compile_step(config: Config, answerer: Architecture, clip_width: int, topology: str) -> dict[str, Any]:
    """Compiles all programs for one topology.

    A batch that cannot be dealt out evenly to the `data` axis is rounded up: such a slice trains on larger batches.
    """
    chip, devices = tpu.slice_devices(topology)
    mesh = sharding.make_mesh(config.mesh.axes, devices)
    data = mesh.shape["data"]
    config = dataclasses.replace(config, batch_size=math.ceil(config.batch_size / data) * data)
    calls = training_step(config, answerer, clip_width, mesh)
    compiled = {name: compile_call(call, mesh, chip) for name, call in calls.items()}
    result = {
        "topology": topology,
        "devices": len(devices),
        "mesh": dict(mesh.shape),
        "batch_size": config.batch_size,
        "hbm_bytes": chip.hbm_bytes,
        "fits": all(program["fits"] for program in compiled.values()),
        "programs": compiled,
    }
    if result["fits"]:
        return result | {"seconds": sum(calls[name].times * program["seconds"] for name, program in compiled.items())}
    return result | {"advice": advice(config, answerer, mesh)}


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


def read_architecture(folder: str, descriptions: Path) -> tuple[Mapping[str, Any], Path]:
    """config.json of a checkpoint folder, or, where that is not there, its description under the folder's name."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        path = descriptions / f"{Path(folder).name}.json"
    if not path.is_file():
        raise weights.CheckpointError(f"{folder}: holds no config.json, and there is no {path} either")
    return weights.read_config(path.parent, path.name), path


def shallow(description: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
    """A config.json with the language model and the image tower cut to `num_layers` layers, all else as it is."""
    vision = dict(description.get("vision_config") or {})
    depth = "depth" if "depth" in vision else "num_hidden_layers"
    vision[depth] = num_layers + (depth == "num_hidden_layers")  # the last layer of a SigLIP tower never runs
    return {**description, "num_hidden_layers": num_layers, "vision_config": vision}


def compile_config(
    config: Config, descriptions: Path, topologies: Sequence[str], num_layers: int = 0, note=lambda text: None
) -> list[dict[str, Any]]:
    """`compile_step` of a config on each topology; `note` is called with the name of the one that begins."""
    description, path = read_architecture(config.answerer.folder, descriptions)
    if num_layers:
        description = shallow(description, num_layers)
    answerer = answerer_architecture(description, path, video=config.answerer.video)
    clip, _ = read_architecture(config.agent.clip, descriptions)
    results = []
    for topology in topologies:
        note(topology)
        results.append(compile_step(config, answerer, ClipConfig.from_hf(clip).projection_dim, topology))
    return results


HEADINGS = (
    "slice",
    "program",
    "arguments",
    "temporaries",
    "output",
    "TFLOP",
    "memory traffic",
    "collectives",
    "compile, processor s",
    "bound by",
    "at least s",
)


def table_rows(results: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """One row of text per program, under HEADINGS: per device, but TFLOP of all of them."""
    rows = []
    for r in results:
        place = f"{r['topology']}, {r['mesh']['data']} x {r['mesh']['model']}, B {r['batch_size']}"
        for name, p in r["programs"].items():
            if not p["fits"]:
                rows.append((place, name, "does not fit", p["reason"], *[""] * (len(HEADINGS) - 4)))
                continue
            sizes = (decimal(p[f"{part}_bytes"]) for part in ("argument", "temporary", "output"))
            costs = f"{p['flops_all_devices'] / 1e12:.4g}", decimal(p["traffic_bytes"])
            compiling = f"{p['compile_processor_seconds']:.0f}"
            least = p["bound"], f"{p['seconds']:.3g}"
            rows.append((place, name, *sizes, *costs, moved(p["collectives"]), compiling, *least))
    return rows


def moved(collectives: Sequence[Mapping[str, Any]]) -> str:
    """Number and bytes of the results of collectives, by kind."""
    kinds = {c["kind"]: [0, 0] for c in collectives}
    for c in collectives:
        kinds[c["kind"]][0] += c["count"]
        kinds[c["kind"]][1] += c["count"] * c["bytes"]
    return ", ".join(f"{count} {kind} {decimal(size)}" for kind, (count, size) in kinds.items()) or "none"


def main() -> int:
    config = config_module.from_flags()
    results = compile_config(
        config,
        Path(config_flags.get_config_filename(flags.FLAGS["config"])).parent / "architectures",
        flags.FLAGS.topology,
        flags.FLAGS.num_layers,
        note=lambda topology: Console(stderr=True).print(f"{topology} ..."),
    )
    table = Table(*HEADINGS, box=None)
    for row in table_rows(results):
        table.add_row(*row)
    console = Console(stderr=True)
    console.width = max(console.width, 200)  # a narrow terminal breaks lines better than the table would cut its cells
    console.print(table)
    for result in results:
        if not result["fits"]:
            console.print(f"{result['topology']}: does not fit. Less memory is taken by: {'; '.join(result['advice'])}")
    entry_point.write_result({"results": results}, flags.FLAGS.output)
    return 0 if all(result["fits"] for result in results) else 1


def define_flags() -> None:
    config_module.define_flag()
    flags.DEFINE_list("topology", ["v5e-8"], "Slices to compile for, e.g. v5e-8,v5e-256,v6e-8,v5p-128.")
    flags.DEFINE_integer("num_layers", 0, "Cut the answerer to this many layers (a quick check); 0 = all.", 0)
    flags.DEFINE_string("output", "", "File for the JSON; default: stdout.")


if __name__ == "__main__":
    define_flags()
    entry_point.run(main, check=config_module.check_overrides)
