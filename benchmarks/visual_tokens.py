"""What merging visual tokens and retrieving videos cost.

    python -m benchmarks.visual_tokens [--videos=10000 --width=768] [--output=FILE.json]

- `merge`: 64 frames of 14 x 14 tokens 3,584 wide (LLaVA-Video-7B's), half of the frames merged: operations and bytes
  of the compiled program, against the operations of the prefill that follows; and its seconds on this machine.
- `retrieval`: a query over so many videos of random embeddings, by retrieval.embeddings.Index: seconds of a search
  after the start, and the bytes that the index holds.
"""

import argparse
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from tspo_jax.models.token_budget import Budget, merge_visual
from tspo_jax.retrieval.embeddings import Index, VideoRows

FRAMES, SIDE, WIDTH = 64, 14, 3584
PARAMETERS = 7.07e9  # of the layers of Qwen2-7B that every token goes through


def merge_cost() -> dict:
    tokens = jnp.asarray(np.random.default_rng(0).normal(size=(1, FRAMES, SIDE * SIDE, WIDTH)), jnp.bfloat16)
    program = jax.jit(lambda x: merge_visual(x, Budget(FRAMES // 2, 0))).lower(tokens).compile()
    cost = program.cost_analysis()
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        jax.block_until_ready(program(tokens))
        seconds.append(time.perf_counter() - began)
    prefill = 2 * PARAMETERS * (FRAMES // 2) * SIDE * (SIDE + 1)
    return {
        "operations": cost["flops"],
        "bytes": cost["bytes accessed"],
        "seconds_here": min(seconds),
        "prefill_operations": prefill,
        "share_of_operations": cost["flops"] / prefill,
    }


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
