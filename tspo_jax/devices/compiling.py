"""Compiling a program ahead of time: what the compiler says that a device holds and what runs on it.

Loops are counted by program_cost.py, and the time is a roofline: the longest of arithmetic, memory traffic and
communication at the chip's published peaks (chips.py), which no run can beat.
"""

import re
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
from rich.filesize import decimal

from tspo_jax.devices.chips import Chip
from tspo_jax.devices.program_cost import Program, arithmetic

# On NVIDIA GPUs large products are computed by cuBLASLt alone: as fast as the best of all that the compiler chooses
# from by default for a language model's, an eighth faster for SigLIP's, and compiled sooner (docs/performance.md).
OPTIONS = {"gpu": {"xla_gpu_enable_cublaslt": True, "xla_gpu_enable_triton_gemm": False}}


def options(platform: str) -> dict[str, Any]:
    """`compiler_options` for `jax.jit` of a large model's program on a platform (gpu, tpu, cpu)."""
    return OPTIONS.get(platform, {})


class Call(NamedTuple):
    """A jitted program with abstract arguments, which a step calls `times`; `while_trips`: program_cost.arithmetic."""

    program: Any
    args: tuple
    kwargs: dict
    while_trips: dict[str, int]
    times: int = 1


class Step(NamedTuple):
    """The programs of a step on a slice, not compiled yet, and what a result says about it beside them."""

    chip: Chip
    mesh: jax.sharding.Mesh
    calls: dict[str, Call]
    facts: dict[str, Any]

    @classmethod
    def on(cls, topology: str, chip: Chip, mesh: jax.sharding.Mesh, calls: dict[str, Call], **facts) -> "Step":
        slice_facts = {"topology": topology, "devices": mesh.size, "mesh": dict(mesh.shape)}
        return cls(chip, mesh, calls, slice_facts | facts | {"hbm_bytes": chip.hbm_bytes})

    def compile(self) -> dict[str, Any]:
        """The facts, whether all programs fit, and what `compile_call` says of each."""
        programs = {name: compile_call(call, self.mesh, self.chip) for name, call in self.calls.items()}
        return self.facts | {"fits": all(program["fits"] for program in programs.values()), "programs": programs}


def compile_call(call: Call, mesh: jax.sharding.Mesh, chip: Chip) -> dict[str, Any]:
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
        "pass_bytes": {scope: program.bytes_of_pass((scope, "while")) for scope in call.while_trips},
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
