"""Memory and time of the temporal agent on long videos, on the CPU.

    python -m benchmarks.agent_scaling

Every row is measured in a process of its own, so that its peak (resident memory, the interpreter included) is its own;
`before` is the peak with the inputs made and nothing run. Inference must stay below 3 GB at 100,000 frames, and its
time be linear in their number.
"""

import json
import os
import resource
import subprocess
import sys
import time

CASES = (
    ("score", 1, 1_000),
    ("score", 1, 10_000),
    ("score", 1, 100_000),
    ("score + gradient", 8, 800),
)
WIDTH = 768
REPEATS = 3


def measure(task: str, batch: int, frames: int) -> dict[str, float]:
    """Peak resident memory in GB (before and after running), and the fastest of `REPEATS` runs in seconds."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from tspo_jax.models.layers import merge_params, split_params
    from tspo_jax.models.temporal_agent import TemporalAgent

    graphdef, params = split_params(TemporalAgent(WIDTH, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    features = jnp.asarray(rng.standard_normal((batch, frames, WIDTH), np.float32))
    text = jnp.asarray(rng.standard_normal((batch, WIDTH), np.float32))
    inputs = (features, text, jnp.zeros((batch, frames)), jnp.ones((batch, frames), bool))

    def score(params, *inputs):
        return merge_params(graphdef, params)(*inputs)

    def objective(params, *inputs):
        return jax.nn.log_softmax(score(params, *inputs))[:, 0].sum()

    run = jax.jit(jax.grad(objective) if task.endswith("gradient") else score)
    before = peak_memory()
    jax.block_until_ready(run(params, *inputs))
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(run(params, *inputs))
        seconds.append(time.perf_counter() - start)
    return {"before": before, "peak": peak_memory(), "seconds": min(seconds)}


def peak_memory() -> float:
    """Peak resident memory of this process so far, GB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def main() -> None:
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    print(f"{'task':18}{'B':>3}{'T':>9}{'peak GB':>10}{'before GB':>11}{'seconds':>10}{'us / frame':>12}")
    for task, batch, frames in CASES:
        command = [sys.executable, "-m", "benchmarks.agent_scaling", json.dumps((task, batch, frames))]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
        row = json.loads(done.stdout)
        memory = f"{row['peak']:>10.2f}{row['before']:>11.2f}"
        per_frame = row["seconds"] / (batch * frames) * 1e6
        print(f"{task:18}{batch:>3}{frames:>9,}{memory}{row['seconds']:>10.3f}{per_frame:>12.1f}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:] and sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    elif sys.argv[1:]:
        print(json.dumps(measure(*json.loads(sys.argv[1]))))
    else:
        main()
