"""The tables of docs/scaling.md: the full-size models compiled for TPU slices.

    python -m benchmarks.scaling [--only=REGEX] [--output=docs/scaling.md]

Takes minutes of the processor per program and needs libtpu (see tspo_jax/aot_compile.py), but no TPU and no weights.
What the compiler said of a program is kept in runs/scaling/ as soon as it is known, and used again; a program that two
configs have in common on a slice is compiled once. Remove the folder, or a file in it, to compile anew. `--only`: of
the programs that are not kept only those whose name (llava_video_7b_v5e-8_answer) holds a match are compiled; the
tables say which slices were not, and lack the programs that were not.
"""

import argparse
import hashlib
import importlib
import json
import math
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.filesize import decimal

KEPT = Path("runs/scaling")
DESCRIPTIONS = Path("configs/architectures")
CASES = {  # config:variant -> slices
    "llava_video_7b": ("v5e-8", "v5e-16", "v6e-8", "v5p-8", "v5e-256"),
    "llava_video_72b": ("v5p-128",),
    "qwen2_5_vl_7b": ("v5e-8",),
    "qwen3_vl_8b": ("v5e-16", "v6e-8", "v5p-8"),
    "tpo_llava_video_7b": ("v5e-8",),
    "tpo_llava_video_7b:full": ("v5e-16", "v5p-8"),
}
PROGRAMS = "sample", "answer", "update", "reference"


class Former(NamedTuple):
    """What this table said before attention was computed by the TPU's kernel and decoding read the cache in place:
    bytes that `answer` moves, the least seconds of a step, and the most memory that a program needs."""

    traffic_bytes: float
    seconds: float
    memory_bytes: float


FORMER = {  # of commit 2e7f0f4, by the same compiler
    ("llava_video_7b", "v5e-8"): Former(2.9e12, 4.82, 15.1e9),
    ("llava_video_7b", "v5e-16"): Former(1.3e12, 2.41, 9.8e9),
    ("llava_video_7b", "v6e-8"): Former(3.2e12, 1.97, 14.3e9),
    ("llava_video_7b", "v5p-8"): Former(6.6e12, 4.14, 25.6e9),
    ("llava_video_7b", "v5e-256"): Former(158.8e9, 0.60, 6.1e9),
    ("llava_video_72b", "v5p-128"): Former(3.0e12, 2.33, 34.4e9),
    ("qwen2_5_vl_7b", "v5e-8"): Former(4.4e12, 5.32, 14.5e9),
}
TEXT = """\
# Scaling

What a training step takes on TPU slices, as the real TPU compiler says for the full-size models: compiled for absent
slices, without weights. This file is written by `python -m benchmarks.scaling`; one slice is
`python -m tspo_jax.aot_compile --config=configs/llava_video_7b.py --topology=v5e-8`.

A slice is named with its mesh, data x model. Bytes are per device, operations (TFLOP) those of all devices together,
collectives their number and the bytes of their results. "At least" is a roofline: the longest of arithmetic, memory
traffic and communication at the published peaks (tspo_jax/devices/chips.py), with every frame and every answer of full
length; a real step takes longer by what the chip falls short of its peaks. What a fused kernel reads is counted once. A
step also loads and decodes the picked frames on the host, which this does not count. Compiling is given in seconds of
the processor, all cores together. A program that is missing, and a slice that is "not compiled", has not been compiled
since the code that it is made of has changed.

## Training an agent

B questions, {G} sets of {K} frames each, {T} candidate frames, {new} answer tokens, bfloat16. Where `data` exceeds
the {B} questions of the config, the batch is as large as `data`; train there with that --config.batch_size.

"Formerly" is what this table said of the same slice before attention took the TPU's kernel and decoding read weights
and cache where they lie (in full: `git show 2e7f0f4:docs/scaling.md`). "Token" is what decoding one token of each
prompt moves, over the bytes of the language model's weights and of the prompts' keys and values. No weights travel in
`answer` where its largest all-gather is smaller than the smallest matrix of a layer of the language model (both in the
last columns); those of frames' tokens (`encode`, whose weights are whole) and of prompts (`sharding_constraint`) do not
count.

{agents}
## Training an answerer

Preference training (preference.md): a batch of pairs, each one sequence of {frames} frames, prompt and both answers.
`update` is a step; `reference` computes what is stored of the untrained model, for as many pairs as go through the
model at a time.

{answerers}
## How it is split

- The language model is split over `model` (heads, hidden width, vocabulary): two sums of activations per layer, and no
  weights travel. `model` is at most the number of key and value heads: 4 for 7B, 8 for 72B.
- The image tower is whole on every device, and the frames are dealt out to all of them; their tokens are gathered.
  Split over `model` it would spend as much time on sums as on arithmetic.
- Prompts are prefilled one set of each question at a time (`answerer.prefill_chunk`), attention is computed for blocks
  of queries, and the cache is updated in place: memory beside weights and cache does not grow with G.
- `mesh.split_over_data` splits the weights over `data` as well; each layer is then gathered when it is used. So does
  preference training of the full model, where the float32 weights and the optimiser's states are split too.
"""


# ---- compile ---------------------------------------------------------------------------------------------


class Case:
    """A config, by its name in CASES, with its models."""

    def __init__(self, name: str):
        from tspo_jax import config as cfg
        from tspo_jax.tpo import ahead_of_time as of_answerers
        from tspo_jax.tpo.config import TpoConfig
        from tspo_jax.tspo import ahead_of_time as of_agents

        module, _, variant = name.partition(":")
        values = importlib.import_module(f"configs.{module}").get_config(variant)
        self.name, self.is_of_answerer = name, "preference" in values
        self.config = cfg.read(values, TpoConfig if self.is_of_answerer else cfg.Config)
        if self.is_of_answerer:
            self.answerer = of_answerers.read_answerer(self.config, DESCRIPTIONS)
            self._step = of_answerers.step_on
            self._models = (self.answerer,)
        else:
            self._models = of_agents.read_models(self.config, DESCRIPTIONS)
            self.answerer = self._models[0]
            self._step = of_agents.step_on

    def kept(self, topology: str, program: str) -> Path:
        return KEPT / f"{self.name.replace(':', '_')}_{topology}_{program}.json"

    def compile(self, topology: str, only: str) -> None:
        """Compiles the programs that are not kept and match."""
        names = [p for p in PROGRAMS if not self.kept(topology, p).is_file()]
        if not any(re.search(only, self.kept(topology, p).stem) for p in names):
            return
        step = self._step(self.config, *self._models, topology)
        for name, call in step.calls.items():
            path = self.kept(topology, name)
            if name not in names or not re.search(only, path.stem):
                continue
            print(f"{path.stem} ...", file=sys.stderr)
            lowered = call.program.trace(*call.args, **call.kwargs).lower().as_text()
            lowered = hashlib.sha256(lowered.encode()).hexdigest()
            result = known(topology, lowered) or compile_call(call, step)
            path.parent.mkdir(parents=True, exist_ok=True)
            facts = step.facts | {"times": call.times, "lowered": lowered, "result": result}
            path.write_text(json.dumps(facts))

    def results(self, topologies: Iterable[str]) -> list[dict]:
        """Of each slice with a program that is kept, as `aot_compile` gives them; `seconds` only where all fit."""
        found = []
        for topology in topologies:
            kept = {p: self.kept(topology, p) for p in PROGRAMS}
            kept = {p: json.loads(path.read_text()) for p, path in kept.items() if path.is_file()}
            if not kept:
                continue
            programs = {p: facts.pop("result") for p, facts in kept.items()}
            result = next(iter(kept.values())) | {"programs": programs}
            result["fits"] = all(program["fits"] for program in programs.values())
            counted = ("update",) if self.is_of_answerer else ("sample", "answer", "update")
            if result["fits"] and programs.keys() >= set(counted):
                result["seconds"] = sum(kept[p]["times"] * programs[p]["seconds"] for p in counted)
            found.append(result)
        return found


def compile_call(call, step) -> dict:
    from tspo_jax.devices import compiling

    return compiling.compile_call(call, step.mesh, step.chip)


def known(topology: str, lowered: str) -> dict | None:
    """What the compiler said of a program whose text has this hash, on the same slice."""
    for path in sorted(KEPT.glob(f"*_{topology}_*.json")):
        facts = json.loads(path.read_text())
        if facts["lowered"] == lowered:
            return facts["result"]
    return None


# ---- write -----------------------------------------------------------------------------------------------


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (headings, ["---"] * len(headings), *rows)) + "\n"


def of_activations(where: str) -> bool:
    """Whether a collective is of activations by its place: the image tower's weights are whole on every device, and
    sharding constraints are on activations alone."""
    return where.startswith("encode") or where.endswith("sharding_constraint")


def memory_in_use(result: Mapping) -> str:
    parts = "argument", "temporary", "output"
    used = max(sum(p[f"{part}_bytes"] for part in parts) for p in result["programs"].values())
    return f"{decimal(used)} of {decimal(result['hbm_bytes'])}"


def section(name: str, tokens: int, results: list[dict], smallest_matrix: int) -> str:
    """The tables of a config that trains an agent. `tokens` are the visual tokens of a prompt, `smallest_matrix` the
    bytes of the smallest weight matrix of a layer of the language model."""
    from tspo_jax.devices.compiling import HEADINGS, table_rows

    slices = []
    for r in results:
        if not r["fits"]:
            slices.append((r["topology"], "does not fit", *[""] * 8))
            continue
        answer, former = r["programs"].get("answer"), FORMER.get((name, r["topology"]))
        row = [r["topology"], memory_in_use(r), f"{r['seconds']:.2f}" if "seconds" in r else ""]
        row.append(f"{former.seconds:.2f}" if former else "")
        if answer:
            gathers = [c for c in answer["collectives"] if c["kind"] == "all-gather"]
            largest = max((c["bytes"] for c in gathers if not of_activations(c["where"])), default=0)
            row += [decimal(answer["traffic_bytes"]), decimal(former.traffic_bytes) if former else ""]
            row.append(f"{answer['pass_bytes']['decode'] / r['token_bytes']:.2f}")
            row.append("none" if largest < smallest_matrix else f"up to {decimal(largest)}")
            row += [decimal(largest), decimal(smallest_matrix)]
        slices.append((*row, *[""] * (10 - len(row))))
    for topology in (t for t in CASES[name] if t not in {r["topology"] for r in results}):
        former = FORMER.get((name, topology))
        told = (f"{former.seconds:.2f}", "", decimal(former.traffic_bytes)) if former else ("", "", "")
        memory = f"not compiled, formerly {decimal(former.memory_bytes)}" if former else "not compiled"
        slices.append((topology, memory, "", *told, "", "", "", ""))
    headings = ("slice", "memory in use", "step at least s", "formerly", "bytes of `answer`", "formerly", "token")
    parts = [
        f"### configs/{name}.py\n",
        f"A prompt has {tokens:,} visual tokens.\n",
        *([table(HEADINGS, table_rows(results))] if results else []),
        table((*headings, "weights gathered", "largest all-gather", "matrix"), slices),
    ]
    if shown := next((r for r in results if r["programs"].get("answer", {}).get("fits")), None):
        collectives = (
            (c["where"], c["kind"], str(c["count"]), decimal(c["bytes"]), str(c["devices"]))
            for c in shown["programs"]["answer"]["collectives"]
        )
        parts.append(f"Collectives of `answer` on {shown['topology']}, the most bytes on the wire first:\n")
        parts.append(table(("in", "kind", "times", "each", "devices"), collectives))
    return "\n".join(parts)


def section_of_answerer(results: Sequence[tuple[str, list[dict]]]) -> str:
    """The tables of (config, its results)s that train an answerer."""
    from tspo_jax.devices.compiling import HEADINGS, table_rows

    parts = []
    for name, of_config in results:
        module, _, variant = name.partition(":")
        missing = [t for t in CASES[name] if t not in {r["topology"] for r in of_config}]
        if missing:
            parts.append(f"configs/{module}.py{variant and ':' + variant} on {', '.join(missing)}: not compiled.\n")
        for r in of_config:
            trained = f"{r['trained']}, {r['frames']} frames, {r['batch_size']} pairs in a step"
            parts.append(f"### configs/{module}.py{variant and ':' + variant}, {r['topology']}\n")
            parts.append(f"{trained}; {memory_in_use(r) if r['fits'] else 'does not fit'}.\n")
            parts.append(table(HEADINGS, table_rows([r])))
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="regular expression: which of the missing programs are compiled")
    parser.add_argument("--output", default="docs/scaling.md", type=Path)
    args = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from tspo_jax.checkpoints import weights

    agents, answerers = [], []
    for name, topologies in CASES.items():
        case = Case(name)
        for topology in topologies:
            case.compile(topology, args.only)
        results = case.results(topologies)
        if case.is_of_answerer:
            answerers.append((name, results))
            frames = case.config.data.num_frames
        else:
            config, answerer = case.config, case.answerer
            layers = weights.flatten(answerer.abstract["language_model"]["layers"]).items()
            smallest = min(2 * math.prod(x.shape[1:]) for path, x in layers if path.endswith("kernel"))
            tokens = answerer.config.num_visual_tokens(config.data.specific.k, *config.answerer.video.frame_size)
            agents.append(section(name, tokens, results, smallest))
    text = TEXT.format(
        B=config.batch_size,
        G=config.policy.group_size,
        K=config.data.specific.k,
        T=max(config.data.buckets),
        new=config.answerer.max_new_tokens,
        agents="\n".join(agents),
        frames=frames,
        answerers=section_of_answerer(answerers),
    )
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(text)


if __name__ == "__main__":
    main()
