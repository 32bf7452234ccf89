"""How many programs the answers of an evaluation take, and what they compute for nothing.

    python -m benchmarks.answer_shapes TSPO_LongVideoBench_frameIdx.json [--batch_size=8]

Reads how many frames each question has from an index file (a video with fewer candidates than the budget has fewer) and
compares a program for every number of frames with the few of answering/shapes.py: programs, batches (those that are not
full are filled up), and frames that are computed, in all and as a share of those that are asked about. No model.
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tspo_jax.answering.shapes import ladder, least
from tspo_jax.evaluation.frame_indices import question_rows


def cost(places: Iterable[int], batch_size: int) -> dict[str, int]:
    """Of requests that are padded to so many frames."""
    batches = {k: -(-count // batch_size) for k, count in Counter(places).items()}
    frames = sum(k * count * batch_size for k, count in batches.items())
    return {"programs": len(batches), "batches": sum(batches.values()), "frames": frames}


def measure(path: Path, batch_size: int) -> dict:
    num_frames = [len(row["frame_idx"]) for row in question_rows(path)]
    rungs = ladder(num_frames)
    found = {"each": cost(num_frames, batch_size), "few": cost([least(rungs, k) for k in num_frames], batch_size)}
    asked = sum(num_frames)
    shares = {name: one | {"computed_per_asked": round(one["frames"] / asked, 3)} for name, one in found.items()}
    return {"questions": len(num_frames), "frames_asked_about": asked, "shapes": list(rungs), **shares}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("index_file", type=Path)
    parser.add_argument("--batch_size", type=int, default=8)
    args = parser.parse_args()
    print(json.dumps(measure(args.index_file, args.batch_size)))
