"""Would it pay to decode in waves, which leave out the prompts whose answers have ended?

    python -m benchmarks.decode_waves [--prompts=64] [--tokens=128]

Times prefill, decoding one token at 1/8, 1/4, 1/2 and all of the prompts, and taking half of a cache, with the small
models of step_time.py (on a GPU or TPU: LLaVA-Video-7B). From these follows what the answers of a batch take whose
lengths are spread evenly from `tokens` / 8 to `tokens`, more than captions' are: decoded until the last one has ended,
as rollout.py does, and in waves, where the batch is halved as soon as half of it, or less, is left. On a CPU seconds
are the processor's, since other work does not count in them, elsewhere the clock's. The result is one JSON object on
stdout.
"""

import argparse
import json
from collections.abc import Mapping

import jax
import numpy as np

from benchmarks.step_time import FULL, SMALL, Decoding, Ours, Piece, World, clock

REPEATS = 5


def seconds_of(call) -> float:
    """The fastest of some calls, after one that compiles."""
    call()
    found = []
    for _ in range(REPEATS):
        start = clock()
        call()
        found.append((clock() - start)[1 if jax.default_backend() == "cpu" else 0])
    return float(min(found))


def totals(lengths: np.ndarray, step: Mapping[int, float], halve: float) -> dict[str, float]:
    """Seconds of decoding a batch of answers, in one go and in waves.

    Args:
      lengths: tokens of each answer.
      step: prompts of a wave -> seconds of a token of each; the largest is the whole batch.
      halve: seconds of taking half of the whole batch's cache.
    """
    sizes = sorted(step)
    whole, waves, size = sizes[-1], 0.0, sizes[-1]
    for token in range(1, lengths.max() + 1):
        fits = next(n for n in sizes if n >= (lengths >= token).sum())
        if fits < size:
            waves, size = waves + halve * 2 * fits / whole, fits
        waves += step[size]
    return {"at once": lengths.max() * step[whole], "in waves": waves}


def measure(ours: Ours, prompts: int, tokens: int, prefilled: int = 8) -> dict:
    step = {}
    for n in (prompts // 8, prompts // 4, prompts // 2, prompts):
        decoding = Decoding(ours, n)
        step[n] = seconds_of(lambda decoding=decoding: decoding(4)) / 4
    half = np.arange(0, prompts, 2)
    halve = seconds_of(Piece(lambda cache: jax.tree.map(lambda x: x[half], cache), decoding.cache))
    prefill = seconds_of(ours.prefill(prefilled)) * prompts / prefilled
    found = totals(np.linspace(tokens / 8, tokens, prompts).astype(int), step, halve)
    saved = 1 - found["in waves"] / found["at once"]
    of_all = (found["at once"] - found["in waves"]) / (prefill + found["at once"])
    return {
        "prompts": prompts,
        "tokens": tokens,
        "seconds": {"prefill": prefill, "a token": step, "halving the cache": halve, "decoding": found},
        "saved": {"of decoding": saved, "of prefill and decoding": of_all},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=64, help="of a batch, a multiple of 8")
    parser.add_argument("--tokens", type=int, default=128, help="of the longest answer")
    args = parser.parse_args()
    setting = SMALL if jax.default_backend() == "cpu" else FULL
    print(json.dumps(measure(Ours(World(setting, 1)), args.prompts, args.tokens), indent=1))


if __name__ == "__main__":
    main()
