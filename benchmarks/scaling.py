"""The table of docs/scaling.md: the full-size models compiled for TPU slices.

    python -m benchmarks.scaling [--output=docs/scaling.md]

Takes some minutes per slice on two cores and needs libtpu (see tspo_jax/ahead_of_time.py), but no TPU and no weights.
A slice's result is kept in runs/scaling/ and used again; remove the folder to compile anew.
"""

import argparse
import importlib
import json
import math
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.filesize import decimal

KEPT = Path("runs/scaling")
CASES = {
    "llava_video_7b": ("v5e-8", "v5e-16", "v6e-8", "v5p-8", "v5e-256"),
    "llava_video_72b": ("v5p-128",),
    "qwen2_5_vl_7b": ("v5e-8",),
}
TEXT = """\
# Scaling

What a training step takes on TPU slices, as the real TPU compiler says for the full-size models: compiled for absent
slices, without weights. This file is written by `python -m benchmarks.scaling`; one slice is
`python -m tspo_jax.aot_compile --config=configs/llava_video_7b.py --topology=v5e-8`.

B questions, {G} sets of {K} frames each, {T} candidate frames, {new} answer tokens, bfloat16. A slice is named with its
mesh, data x model. Bytes are per device, operations (TFLOP) those of all devices together, collectives their number
and the bytes of their results. "At least" is a roofline: the longest of arithmetic, memory traffic and communication
at the published peaks (tspo_jax/devices/chips.py), with every frame and every answer of full length; a real step takes
longer by what the chip falls short of its peaks. A step also loads and decodes the picked frames on the host, which
this does not count. Where `data` exceeds the {B} questions of the config, the batch is as large as `data`; train there
with that --config.batch_size. Compiling is given in seconds of the processor, all cores together.

No weights travel in `answer` where its largest all-gather is smaller than the smallest matrix of a layer of the
language model (both in the last columns); those of frames' tokens (`encode`, whose weights are whole) and of prompts
(`sharding_constraint`) do not count.

{tables}
## How it is split

- The language model is split over `model` (heads, hidden width, vocabulary): two sums of activations per layer, and no
  weights travel. `model` is at most the number of key and value heads: 4 for 7B, 8 for 72B.
- The image tower is whole on every device, and the frames are dealt out to all of them; their tokens are gathered.
  Split over `model` it would spend as much time on sums as on arithmetic.
- Prompts are prefilled one set of each question at a time (`answerer.prefill_chunk`), attention is computed for 512
  queries at a time, and the cache is updated in place: memory beside weights and cache does not grow with G.
- `mesh.split_over_data` splits the weights over `data` as well; each layer is then gathered when it is used.
"""


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (headings, ["---"] * len(headings), *rows)) + "\n"


def of_activations(where: str) -> bool:
    """Whether a collective is of activations by its place: the image tower's weights are whole on every device, and
    sharding constraints are on activations alone."""
    return where.startswith("encode") or where.endswith("sharding_constraint")


def section(name: str, tokens: int, results: list[dict], smallest_matrix: int) -> str:
    """A config's tables. `tokens` are the visual tokens of a prompt, `smallest_matrix` the bytes of the smallest weight
    matrix of a layer of the language model."""
    from tspo_jax.devices.compiling import HEADINGS, table_rows

    slices = []
    for r in results:
        if not r["fits"]:
            slices.append((r["topology"], "does not fit", *[""] * 4))
            continue
        parts = "argument", "temporary", "output"
        used = max(sum(p[f"{part}_bytes"] for part in parts) for p in r["programs"].values())
        gathers = [c for c in r["programs"]["answer"]["collectives"] if c["kind"] == "all-gather"]
        largest = max((c["bytes"] for c in gathers if not of_activations(c["where"])), default=0)
        gathered = "none" if largest < smallest_matrix else f"up to {decimal(largest)}"
        room = f"{decimal(used)} of {decimal(r['hbm_bytes'])}"
        sizes = decimal(largest), decimal(smallest_matrix)
        slices.append((r["topology"], room, f"{r['seconds']:.2f}", gathered, *sizes))
    collectives = (
        (c["where"], c["kind"], str(c["count"]), decimal(c["bytes"]), str(c["devices"]))
        for c in (results[0]["programs"].get("answer") or {}).get("collectives", ())
    )
    return "\n".join(
        (
            f"## configs/{name}.py\n",
            f"A prompt has {tokens:,} visual tokens.\n",
            table(HEADINGS, table_rows(results)),
            table(
                ("slice", "memory in use", "step at least s", "weights gathered", "largest all-gather", "matrix"),
                slices,
            ),
            f"Collectives of `answer` on {results[0]['topology']}, the most bytes on the wire first:\n",
            table(("in", "kind", "times", "each", "devices"), collectives),
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="docs/scaling.md", type=Path)
    output = parser.parse_args().output
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from tspo_jax import config as cfg
    from tspo_jax.checkpoints import weights
    from tspo_jax.checkpoints.folders import answerer_architecture
    from tspo_jax.tspo import ahead_of_time

    sections, descriptions = [], Path("configs/architectures")
    for name, topologies in CASES.items():
        config = cfg.read(importlib.import_module(f"configs.{name}").get_config())
        results = []
        for topology in topologies:
            kept = KEPT / f"{name}_{topology}.json"
            if not kept.is_file():
                print(f"{name}: {topology} ...", file=sys.stderr)
                (result,) = ahead_of_time.compile_config(config, descriptions, [topology])
                kept.parent.mkdir(parents=True, exist_ok=True)
                kept.write_text(json.dumps(result))
            results.append(json.loads(kept.read_text()))
        description = ahead_of_time.read_architecture(config.answerer.folder, descriptions)
        answerer = answerer_architecture(*description, video=config.answerer.video)
        layers = weights.flatten(answerer.abstract["language_model"]["layers"]).items()
        smallest = min(2 * math.prod(x.shape[1:]) for path, x in layers if path.endswith("kernel"))
        tokens = answerer.config.num_visual_tokens(config.data.specific.k, *config.answerer.video.frame_size)
        sections.append(section(name, tokens, results, smallest))
    text = TEXT.format(
        B=config.batch_size,
        G=config.policy.group_size,
        K=config.data.specific.k,
        T=max(config.data.buckets),
        new=config.answerer.max_new_tokens,
        tables="\n".join(sections),
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text)


if __name__ == "__main__":
    main()
