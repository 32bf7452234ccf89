"""What a run will need: memory before its first step, time before and after it.

Memory is what the compiler says of the programs of a step at the shapes that they will run with. The time before the
first step is a roofline, which no run can beat (aot_compile.py), on chips that devices/chips.py knows; after a few
steps it is what they took.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from rich.filesize import decimal

from tspo_jax.devices import sharding
from tspo_jax.devices.chips import Chip, chip_of
from tspo_jax.devices.compiling import Call, compile_call

MEASURED_STEPS = 5  # of a run, none of which compiled anything, before its time is told


class Estimate:
    """Of a step's programs: bytes of a device, and seconds where the chip is known."""

    def __init__(self, calls: Mapping[str, Call], mesh: jax.sharding.Mesh):
        device = next(device for device in mesh.devices.flat if device.process_index == jax.process_index())
        self.chip = chip_of(device)
        self.programs = {name: _compile(call, mesh, self.chip) for name, call in calls.items()}
        self.bytes = max(program["bytes"] for program in self.programs.values())
        stats = device.memory_stats()
        self.available = stats["bytes_limit"] if stats else None
        seconds = [calls[name].times * program.get("seconds", 0) for name, program in self.programs.items()]
        self.seconds = sum(seconds) if self.chip else None


class Steps(NamedTuple):
    """The `share` of a run's steps that have one shape (see runs/loop.py), in words, and what each of them needs."""

    shape: Hashable
    words: str
    share: float
    cost: Estimate


def said(steps: Sequence[Steps], num_steps: int) -> str:
    """The memory of the largest steps and, where the chip is known, the least time of all."""
    largest = max(steps, key=lambda of_shape: of_shape.cost.bytes)
    cost = largest.cost
    parts = ", ".join(f"{name} {decimal(program['bytes'])}" for name, program in cost.programs.items())
    text = f"memory of a device {decimal(cost.bytes)}"
    if cost.available:
        text += f" of {decimal(cost.available)}"
    text += f" ({parts}; {largest.words})"
    if cost.seconds:
        mean = sum(of_shape.share * of_shape.cost.seconds for of_shape in steps)
        text += f"; at least {mean:.3g} s per step, {clock(mean * num_steps)} for all"
    return text


def _compile(call: Call, mesh: jax.sharding.Mesh, chip: Chip | None) -> dict[str, Any]:
    if chip:
        found = compile_call(call, mesh, chip)
        if not found["fits"]:
            raise sharding.ShardingError(f"the programs of a step do not fit on a device: {found['reason']}")
        return {
            "bytes": sum(found[f"{part}_bytes"] for part in ("argument", "temporary", "output")),
            "seconds": found["seconds"],
        }
    memory = call.program.lower(*call.args, **call.kwargs).compile().memory_analysis()
    used = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    return {"bytes": used + memory.output_size_in_bytes - memory.alias_size_in_bytes}


class Pace:
    """Steps per second of a run, against the roofline where there is one."""

    def __init__(self, num_steps: int):
        self._num_steps = num_steps
        self._least: dict[Hashable, float] = {}  # shape -> least seconds of a step, where the chip is known
        self._seconds: list[float] = []
        self._compilations = None
        self._said = False

    def expect(self, steps: Iterable[Steps]) -> None:
        of_shapes: dict[Hashable, list[Steps]] = {}
        for of_shape in steps:
            if of_shape.cost.seconds:
                of_shapes.setdefault(of_shape.shape, []).append(of_shape)
        for shape, found in of_shapes.items():  # the mean, where steps of a shape run one of several programs
            total = sum(of_shape.share for of_shape in found)
            self._least[shape] = sum(of_shape.share * of_shape.cost.seconds for of_shape in found) / total

    def row(self, step: int, shape: Hashable | None, seconds: float, compilations: int) -> dict[str, float]:
        """Metrics of a step: `steps_per_second`, and `roofline_share` (of the most that the chip could do).

        Steps whose shape is None say nothing of how long the others will take.
        """
        if shape is not None and compilations == self._compilations:
            self._seconds.append(seconds)
        self._compilations, self._step = compilations, step
        row = {"steps_per_second": 1 / max(seconds, 1e-9)}
        least = self._least.get(shape)
        return row | ({"roofline_share": least / seconds} if least else {})

    def said(self) -> str:
        """Once, after the first steps: how long the run will take."""
        if self._said or len(self._seconds) < MEASURED_STEPS or self._step == self._num_steps:
            return ""
        self._said = True
        mean, left = sum(self._seconds) / len(self._seconds), self._num_steps - self._step
        return f"{mean:.2f} s per step: about {clock(mean * left)} for the {left} steps that are left"


def clock(seconds: float) -> str:
    """Seconds in the unit that reads best."""
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
