"""What a compiled program costs: arithmetic, memory traffic and communication, with every loop counted.

XLA's own `cost_analysis()` counts the body of a loop once, and our programs are loops over layers and chunks. So the
arithmetic is counted in the jaxpr, where the lengths of scans are known, and the traffic and the collectives in the
compiled HLO, whose loops are recognised by the names that they have from the jaxpr.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from functools import cached_property

import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr

Path = tuple[str, ...]  # named scopes and "while"s around an operation, outermost first


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """Of a jaxpr, over all devices: floating point operations of its matrix products and convolutions, and how often
    the body of each loop runs."""

    flops: float
    trips: dict[Path, int]


def arithmetic(jaxpr: ClosedJaxpr, while_trips: Mapping[str, int]) -> Arithmetic:
    """Counts a jaxpr.

    Args:
      while_trips: named scope -> number of passes through a loop right in it whose length depends on the data.
    Raises:
      ValueError: for such a loop in a scope that is not listed.
    """
    trips: dict[Path, int] = {}

    def count(jaxpr: Jaxpr, path: Path) -> float:
        total = 0.0
        for eqn in jaxpr.eqns:
            here = path + _scopes(str(eqn.source_info.name_stack))
            name, params = eqn.primitive.name, eqn.params
            if name == "dot_general":
                (contracted, _), _ = params["dimension_numbers"]
                lhs = eqn.invars[0].aval.shape
                total += 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(lhs[i] for i in contracted)
            elif name == "conv_general_dilated":
                kernel = eqn.invars[1].aval.shape
                features = kernel[params["dimension_numbers"].rhs_spec[0]]
                total += 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(kernel) / features
            elif name in ("scan", "while"):
                here = (*here, "while")
                if name == "scan":
                    times, body = params["length"], params["jaxpr"]
                elif here[-2:-1] and here[-2] in while_trips:
                    times, body = while_trips[here[-2]], params["body_jaxpr"]
                else:
                    raise ValueError(f"the loop in {'/'.join(here)} depends on the data: say how often it runs")
                if trips.setdefault(here, times) != times:
                    raise ValueError(f"two loops are both called {'/'.join(here)}: give them named scopes")
                total += times * count(body.jaxpr, here)
            elif name == "pallas_call":  # its jaxpr is one step of its grid
                total += _live_steps(params["grid_mapping"].grid, here) * count(params["jaxpr"], here)
            elif name == "cond":
                total += max(count(branch.jaxpr, here) for branch in params["branches"])
            else:
                total += sum(count(inner, here) for inner in _inner_jaxprs(params))
        return total

    return Arithmetic(count(jaxpr.jaxpr, ()), trips)


def _live_steps(grid: tuple[int, ...], here: Path) -> float:
    """Steps of a kernel that do something. Causal attention (models/attention.py) skips the blocks of keys, the last
    axis of its grid, that lie behind the block of queries."""
    steps = math.prod(grid)
    return steps * (grid[-1] + 1) / (2 * grid[-1]) if "causal_kernel" in here else steps


def _inner_jaxprs(params: Mapping) -> Iterator[Jaxpr]:
    for value in params.values():
        if isinstance(value, ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, Jaxpr):
            yield value


def _scopes(op_name: str) -> Path:
    """`jit(f)/jvp(encode)/while/body/closed_call/dot_general` -> (encode, while, dot_general): less the parts that a
    jaxpr does not have, and what differentiation wraps around a scope."""
    skipped = re.compile(r"body|cond|closed_call|checkpoint|rematted_computation|\w+\(.*\)|")
    parts = (re.sub(r"^(?:(?:jvp|transpose)\()+([^()]+)\)+$", r"\1", part) for part in op_name.split("/"))
    return tuple(part for part in parts if not skipped.fullmatch(part))


@dataclasses.dataclass(frozen=True)
class Collective:
    """Collectives of one kind and size: `size` bytes of the result on a device, in groups of `group` devices, run
    `count` times."""

    kind: str
    size: int
    group: int
    count: int
    where: str  # name of the operation in the jaxpr that it came from

    @property
    def wire_bytes(self) -> float:
        """Bytes that each device sends over all runs, in a ring."""
        sent = {"all-reduce": 2.0, "reduce-scatter": self.group}.get(self.kind, 1.0)
        share = 1.0 if self.kind == "collective-permute" else (self.group - 1) / self.group
        return self.count * self.size * sent * share


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    rest: str  # attributes

    @property
    def called(self) -> list[str]:
        return [
            name.strip().lstrip("%")
            for names in re.findall(r"(?:calls|body|branch_computations)=\{?(%[\w.\-]+(?:, %[\w.\-]+)*)", self.rest)
            for name in names.split(",")
        ]

    @property
    def path(self) -> Path:
        name = re.search(r'op_name="([^"]*)"', self.rest)
        return _scopes(name[1]) if name else ()


# Nothing moves for these; what runs inside a loop or call is counted there.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "iota"}
FREE |= {"after-all", "partition-id", "replica-id", "opt-barrier"}
SLICES = {"dynamic-slice", "slice", "gather"}  # read what they return and no more of their operand
UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # done in place: which operand is the new part
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
INSTRUCTION = re.compile(r"^\s*(ROOT )?%([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*?)\)(, .*)?$")
ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")


class Program:
    """The text of a compiled module (`compiled.as_text()`), with the trips of its loops from `arithmetic`."""

    def __init__(self, text: str, trips: Mapping[Path, int], num_devices: int):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.roots: dict[str, Instruction] = {}
        self.num_devices = num_devices
        entry = block = None
        for line in text.splitlines():
            if start := re.match(r"^(ENTRY )?%([\w.\-]+) \(.*\{$", line):
                block = start[2]
                self.computations[block] = {}
                entry = block if start[1] else entry
            elif block and (found := INSTRUCTION.match(line)):
                operands = tuple(re.findall(r"%([\w.\-]+)", found[5]))
                instruction = Instruction(found[2], found[3], found[4], operands, found[6] or "")
                if instruction.opcode == "parameter":
                    instruction = dataclasses.replace(instruction, rest=found[5])
                self.computations[block][found[2]] = instruction
                if found[1]:
                    self.roots[block] = instruction
        self.entry, self.trips = entry, trips
        self.runs: dict[str, int] = {}  # how often each computation runs
        self._count_runs(entry, 1)

    def _count_runs(self, computation: str, times: int) -> None:
        self.runs[computation] = self.runs.get(computation, 0) + times
        for instruction in self.computations[computation].values():
            for called in instruction.called:
                self._count_runs(called, times * self._passes(instruction))

    def _passes(self, instruction: Instruction) -> int:
        """How often an instruction runs what it calls."""
        return self.trips.get(instruction.path, 1) if instruction.opcode == "while" else 1

    @cached_property
    def collectives(self) -> list[Collective]:
        """Collectives, the most bytes on the wire first."""
        counts: dict[tuple, int] = {}
        for name, times in self.runs.items():
            for instruction in self.computations[name].values():
                kind = instruction.opcode.removesuffix("-start")
                if kind in COLLECTIVES:
                    size = max(_array_bytes(array) for array in ARRAY.finditer(instruction.shape))
                    key = kind, size, self._group(instruction.rest), "/".join(instruction.path)
                    counts[key] = counts.get(key, 0) + times
        found = [Collective(kind, size, group, n, where) for (kind, size, group, where), n in counts.items()]
        return sorted(found, key=lambda c: -c.wire_bytes)

    def _group(self, rest: str) -> int:
        """Number of devices that take part in one collective."""
        if tiled := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):
            return int(tiled[1])
        if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
            return len(listed[1].split(","))
        if named := re.search(r"replica_groups=mesh\[([^\]]*)\].*?\{('[^}]*)\}", rest):
            sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
            return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", named[2]))
        return self.num_devices

    @cached_property
    def hbm_bytes(self) -> int:
        """Bytes that a device reads from and writes to its memory. On-chip memory (a layout with S(1)) is free, and a
        slice or an update in place moves that part alone, as in XLA's cost analysis."""
        return self._moved(self.entry)

    def bytes_of_pass(self, path: Path) -> int | None:
        """`hbm_bytes` of one pass through the loop that the jaxpr has at `path`; None where there is no such loop."""
        for values in self.computations.values():
            for instruction in values.values():
                if instruction.opcode == "while" and instruction.path == path:
                    return sum(map(self._moved, instruction.called))
        return None

    def _moved(self, computation: str) -> int:
        values, total = self.computations[computation], 0
        for instruction in values.values():
            total += self._traffic(values, instruction)
            if instruction.opcode != "fusion":  # of which `_traffic` says everything
                total += self._passes(instruction) * sum(map(self._moved, instruction.called))
        return total

    def _traffic(self, values: Mapping[str, Instruction], instruction: Instruction) -> int:
        if instruction.opcode in FREE or instruction.opcode.endswith("-done"):
            return 0
        size = {name: _hbm_bytes(values[name].shape) for name in instruction.operands}
        result = _hbm_bytes(instruction.shape)
        if instruction.opcode == "slice-start":  # its shape is a tuple of the whole array, the slice, ...
            part = list(ARRAY.finditer(instruction.shape))[1]
            return _array_bytes(part) + _hbm_bytes(part[0])
        if instruction.opcode.endswith("-start"):  # its shape is a tuple of what it reads and what it writes
            return result
        if instruction.opcode == "fusion":
            (body,) = instruction.called
            reads = sum(min(size[name], self._read(body, i)) for i, name in enumerate(instruction.operands))
            return reads + min(result, self._written(body, self.roots[body]))
        if instruction.opcode in SLICES:
            moved = _bytes(instruction.shape)
            return result + min(moved, size[instruction.operands[0]])
        if instruction.opcode in UPDATES:
            return 2 * size[instruction.operands[UPDATES[instruction.opcode]]]
        return result + sum(size.values())

    def _read(self, body: str, position: int) -> int:
        """Bytes that the fused computation `body` reads of its parameter number `position`."""
        parameter = next(
            i for i in self.computations[body].values() if i.opcode == "parameter" and i.rest == str(position)
        )
        return self._read_of(body, parameter)

    def _read_of(self, body: str, value: Instruction) -> int:
        total, full = 0, _bytes(value.shape)  # of an operand in HBM, wherever what is read of it goes
        if value.name == self.roots[body].name:  # of a fusion in a fusion, which hands it on as it is
            return full
        for user in self.computations[body].values():
            for i, operand in enumerate(user.operands):
                if operand != value.name:
                    continue
                if user.opcode in SLICES and i == 0:
                    total += _bytes(user.shape)
                elif user.opcode in UPDATES and i == 0:
                    total += 0
                elif user.opcode == "bitcast":
                    total += self._read_of(body, user)
                elif user.opcode == "fusion":
                    total += self._read(user.called[0], i)
                else:
                    return full
        return min(total, full)

    def _written(self, body: str, value: Instruction) -> int:
        """Bytes of `value`, the root of a fused computation, that are new."""
        values = self.computations[body]
        if value.opcode == "tuple":
            return sum(self._written(body, values[name]) for name in value.operands)
        if value.opcode == "bitcast":
            return self._written(body, values[value.operands[0]])
        if value.opcode == "fusion":
            return self._written(value.called[0], self.roots[value.called[0]])
        if value.opcode in UPDATES:
            return _hbm_bytes(values[value.operands[UPDATES[value.opcode]]].shape)
        return _hbm_bytes(value.shape)


def _bytes(shape: str) -> int:
    return sum(map(_array_bytes, ARRAY.finditer(shape)))


def _hbm_bytes(shape: str) -> int:
    return sum(_array_bytes(array) for array in ARRAY.finditer(shape) if "S(" not in (array[3] or ""))


def _array_bytes(array: re.Match) -> int:
    dtype, dims = array[1], array[2]
    bits = 8 if dtype in ("pred", "token") else int(re.match(r"[a-z]+(\d+)", dtype)[1])
    return int(np.prod([int(d) for d in dims.split(",") if d], dtype=np.int64)) * bits // 8
