"""The table of docs/scaling.md: the full-size models compiled for TPU slices.

    python -m benchmarks.scaling [--output=docs/scaling.md]

Takes some minutes per slice on two cores and needs libtpu (see tspo_jax/aot_compile.py), but no TPU and no weights.
A slice's result is kept in runs/scaling/ and used again; remove the folder to compile anew.
"""

import argparse
import importlib
import json
import os
from pathlib import Path

KEPT = Path("runs/scaling")
CASES = {
    "llava_video_7b": ("v5e-8", "v5e-16", "v6e-8", "v5p-8", "v5e-256"),
    "llava_video_72b": ("v5p-128",),
}
TEXT = """\
# Scaling

What a training step takes on TPU slices, as the real TPU compiler says for the full-size models: compiled for absent
slices, without weights. This file is written by `python -m benchmarks.scaling`; one slice is
`python -m tspo_jax.aot_compile --config=configs/llava_video_7b.py --topology=v5e-8`, which also lists every collective.

B questions, {G} sets of {K} frames of 384 x 384 each ({tokens:,} visual tokens a prompt), {T} candidate frames, {new}
answer tokens, bfloat16. Mesh is data x model. Bytes are per device. "At least" is a roofline: the longest of
arithmetic, memory traffic and communication at the chip's published peaks (tspo_jax/tpu.py), with every frame and every
answer of full length; a real step takes longer by what the chip falls short of its peaks. A step also loads and decodes
the picked frames on the host, which this does not count. Where `data` exceeds the 16 questions of the config, the batch
is as large as `data`; train there with that --config.batch_size.

{tables}
## How it is split

- The language model is split over `model` (heads, hidden width, vocabulary): two sums of activations per layer, and no
  weights travel. `model` is at most the number of key and value heads: 4 for 7B, 8 for 72B.
- The image tower is whole on every device, and the frames are dealt out to all of them. Split over `model` it would
  spend as much time on sums as on arithmetic.
- Prompts are prefilled one set of each question at a time (`answerer.prefill_chunk`), attention is computed for 512
  queries at a time, and the cache is updated in place: memory beside weights and cache does not grow with G.
- `mesh.split_over_data` splits the weights over `data` as well; each layer is then gathered when it is used.
"""


def table(config_name: str, results: list[dict]) -> str:
    from tspo_jax.aot_compile import GIB, HEADINGS, table_rows

    lines = [f"## configs/{config_name}.py", "", "| " + " | ".join(HEADINGS) + " |", "|---" * len(HEADINGS) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in table_rows(results)]
    lines += [
        "",
        "| slice | step at least s | memory in use | of | largest all-gather in `answer` |",
        "|---|---|---|---|---|",
    ]
    for r in results:
        if not r["fits"]:
            lines.append(f"| {r['topology']} | does not fit | | | |")
            continue
        used = max(
            sum(p[f"{part}_bytes"] for part in ("argument", "temporary", "output")) for p in r["programs"].values()
        )
        gathers = [c["bytes"] for c in r["programs"]["answer"]["collectives"] if c["kind"] == "all-gather"]
        largest = f"{max(gathers, default=0) / 2**20:.1f} MiB"
        used, all_of_it = f"{used / GIB:.1f} GiB", f"{r['hbm_bytes'] / GIB:.1f} GiB"
        lines.append(f"| {r['topology']} | {r['seconds']:.2f} | {used} | {all_of_it} | {largest} |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="docs/scaling.md", type=Path)
    output = parser.parse_args().output
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from tspo_jax import aot_compile
    from tspo_jax import config as cfg
    from tspo_jax.checkpoints import answerer_architecture

    tables, descriptions = [], Path("configs/architectures")
    for name, topologies in CASES.items():
        config = cfg.read(importlib.import_module(f"configs.{name}").get_config())
        results = []
        for topology in topologies:
            kept = KEPT / f"{name}_{topology}.json"
            if not kept.is_file():
                print(f"{name}: {topology} ...", flush=True)
                (result,) = aot_compile.compile_config(config, descriptions, [topology])
                kept.parent.mkdir(parents=True, exist_ok=True)
                kept.write_text(json.dumps(result))
            results.append(json.loads(kept.read_text()))
        tables.append(table(name, results))
    answerer = answerer_architecture(*aot_compile.read_architecture(config.answerer.folder, descriptions))
    K = config.data.specific.k
    text = TEXT.format(
        G=config.policy.group_size,
        K=K,
        T=max(config.data.buckets),
        new=config.answerer.max_new_tokens,
        tokens=answerer.config.num_visual_tokens(K),
        tables="\n".join(tables),
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text)


if __name__ == "__main__":
    main()
