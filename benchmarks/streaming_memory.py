"""What a stream holds and what a question costs, by the length of the video.

    python -m benchmarks.streaming_memory [--width=256] [--frames=16]

Prints one JSON object: for 10 minutes and 10 hours of video at 1 frame per second the bytes of the recurrent state, of
the bank on the host, the compiled `push`'s temporary bytes and the visual tokens of the answerer's prompt. Nothing is
trained or run: the programs are compiled for the sizes, which is what must not grow.
"""

import argparse
import json

import jax
import jax.numpy as jnp
import numpy as np

from tspo_jax.models.layers import merge_params
from tspo_jax.models.streaming import StreamingConfig
from tspo_jax.streaming.folders import graphdef_of

LENGTHS = {"10 minutes": 600, "10 hours": 36_000}  # seconds


def measure(config: StreamingConfig, patches: int, seconds: int) -> dict:
    """Of a stream that has come this far."""
    graphdef, abstract = graphdef_of(config)
    clips = -(-seconds // config.frames)
    vector = config.width * np.dtype(np.float32).itemsize
    memory = jax.ShapeDtypeStruct((1, config.summary, config.width), jnp.float32)
    clip = jax.ShapeDtypeStruct((1, config.frames, patches, config.feature_width), jnp.float32)
    times = jax.ShapeDtypeStruct((1, 2), jnp.float32)

    def push(params, memory, clip, times):
        return merge_params(graphdef, params).push(memory, clip, times, jnp.ones(1, bool))

    compiled = jax.jit(push).lower(abstract, memory, clip, times).compile()
    handed_on = jax.eval_shape(push, abstract, memory, clip, times)[0]
    return {
        "clips": clips,
        "state_bytes": handed_on.size * handed_on.dtype.itemsize,
        "push_temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "prompt_visual_tokens": config.num_visual_tokens,
        "bank_bytes_on_host": clips * (config.summary + 1) * vector,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--frames", type=int, default=16)
    args = parser.parse_args()
    config = StreamingConfig(
        args.width, args.width, frames=args.frames, width=args.width, num_layers=2, num_heads=4, num_kv_heads=4,
        hidden=2 * args.width,
    )  # fmt: skip
    print(json.dumps({name: measure(config, 16, seconds) for name, seconds in LENGTHS.items()}, indent=1))


if __name__ == "__main__":
    main()
