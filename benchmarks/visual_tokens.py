"""What merging visual tokens and retrieving videos cost.

    python -m benchmarks.visual_tokens [--videos=10000 --width=768] [--output=FILE.json]

- `merge`: 64 frames of 14 x 14 tokens 3,584 wide (LLaVA-Video-7B's), half of the frames merged: operations and bytes
  of the compiled program, against the operations of the prefill that follows; and its seconds on this machine in
  float32, against those of the prefill: one layer of Qwen2-7B's widths is timed on 2 frames, and counted for 28 layers
  and 32 frames in proportion. That leaves out that attention grows with the square of the tokens, and the head: the
  prefill is longer, the share smaller. Medians.
- `retrieval`: a query over so many videos of random embeddings, by retrieval.embeddings.Index: seconds of a search
  after the start, and the bytes that the index holds.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tspo_jax.models.layers import abstract_module, merge_params
from tspo_jax.models.qwen2 import Qwen2, Qwen2Config
from tspo_jax.models.token_budget import Budget, merge_visual
from tspo_jax.retrieval.embeddings import Index, VideoRows

FRAMES, SIDE, WIDTH = 64, 14, 3584
PARAMETERS = 7.07e9  # of the layers of Qwen2-7B that every token goes through
LAYERS, LAYER_FRAMES = 28, 2
QWEN2_7B = Qwen2Config(8, WIDTH, 18944, 1, 28, 4)  # one layer, hardly any words


def merge_cost() -> dict:
    tokens = jnp.asarray(np.random.default_rng(0).normal(size=(1, FRAMES, SIDE * SIDE, WIDTH)), jnp.bfloat16)
    merge = jax.jit(lambda x: merge_visual(x, Budget(FRAMES // 2, 0)).tokens)
    cost = merge.lower(tokens).compile().cost_analysis()
    prefill = 2 * PARAMETERS * (FRAMES // 2) * SIDE * (SIDE + 1)
    seconds, layer = median_seconds(merge, tokens.astype(jnp.float32)), layer_seconds()
    prefill_seconds = layer * LAYERS * (FRAMES // 2) / LAYER_FRAMES
    return {
        "operations": cost["flops"],
        "bytes": cost["bytes accessed"],
        "prefill_operations": prefill,
        "share_of_operations": cost["flops"] / prefill,
        "seconds": seconds,
        "layer_seconds": layer,
        "prefill_seconds": prefill_seconds,
        "share_of_seconds": seconds / prefill_seconds,
    }


def layer_seconds(cfg: Qwen2Config = QWEN2_7B, num_frames: int = LAYER_FRAMES) -> float:
    """Of one layer on the tokens of `num_frames` frames, newlines included; float32."""
    graphdef, abstract = abstract_module(lambda rngs: Qwen2(cfg, rngs=rngs))
    params = jax.tree.map(lambda x: jnp.full(x.shape, 0.01, x.dtype), abstract)
    N = num_frames * SIDE * (SIDE + 1)
    states = jnp.asarray(np.random.default_rng(0).normal(size=(1, N, cfg.hidden_size)), jnp.float32)

    @jax.jit
    def run(params, states):
        return merge_params(graphdef, params)(states, jnp.arange(N)[None])[0]

    return median_seconds(run, params, states)


def median_seconds(program: Callable, *args: Any) -> float:
    """Of five calls, after one."""
    jax.block_until_ready(program(*args))
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        jax.block_until_ready(program(*args))
        seconds.append(time.perf_counter() - began)
    return float(np.median(seconds))


class _Random:
    """An embedder of random unit vectors, eleven for each video (a whole and ten stretches)."""

    def __init__(self, width: int):
        self._width = width

    def _rows(self, seed: int, count: int) -> np.ndarray:
        rows = np.random.default_rng(seed).normal(size=(count, self._width)).astype(np.float32)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    def texts(self, texts: list[str]) -> np.ndarray:
        return self._rows(hash(texts[0]) % 2**32, len(texts))

    def video(self, name: str) -> VideoRows:
        return VideoRows(self._rows(int(name), 11), np.zeros((11, 2)))

    def has(self, name: str) -> bool:
        return True


def retrieval_cost(num_videos: int, width: int) -> dict:
    index = Index([str(i) for i in range(num_videos)], _Random(width))
    seconds = []
    for query in ("a", "b", "c", "d", "e"):
        began = time.perf_counter()
        index.search(query, 10)
        seconds.append(time.perf_counter() - began)
    return {"videos": num_videos, "width": width, "seconds": max(seconds), "index_bytes": num_videos * width * 4}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=10_000, help="how many are searched")
    parser.add_argument("--width", type=int, default=768, help="of the embeddings")
    parser.add_argument("--output", default="", help="JSON file; stdout if empty")
    args = parser.parse_args()
    result = {"retrieval": retrieval_cost(args.videos, args.width), "merge": merge_cost()}
    text = json.dumps(result, indent=1) + "\n"
    if args.output:
        Path(args.output).write_text(text)
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
