"""Peak host memory of loading a checkpoint, on the CPU, where the arrays themselves lie in host memory too.

    python -m benchmarks.load_memory --folder=/tmp/checkpoint

Writes weights of LLaVA-Video's shapes in bfloat16 below the folder (3.2 GB in 4 files; removed again), loads them in a
process of its own on one device and on a (2, 4) mesh, and prints JSON: `peak` is the peak of resident memory,
`before` what the process had before loading, `held` the bytes of the arrays. `over`, the rest, must stay below 2 GB.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from absl import app, flags

NUM_FILES = 4
CONFIG = {  # the 7B's width, with few layers: its largest tensors are the embeddings, as they are in full
    "model_type": "llava_qwen",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 3,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 65536,
    "mm_patch_merge_type": "spatial_unpad",
    "mm_newline_position": "grid",
}
MESHES = {"one device": 1, "2 x 4 devices": 8}


def write_checkpoint(folder: Path, config: dict) -> None:
    """Random bfloat16 weights of the answerer that `config` (a config.json) describes, file by file."""
    import numpy as np
    from safetensors.numpy import save_file

    from tspo_jax.checkpoints import weights
    from tspo_jax.checkpoints.folders import answerer_architecture

    (folder / "config.json").write_text(json.dumps(config))
    architecture = answerer_architecture(config, folder)
    block = np.random.default_rng(0).standard_normal(2**20, np.float32).astype(weights.BFLOAT16)
    leaves = list(weights.flatten(architecture.abstract).items())
    for i in range(NUM_FILES):
        params = {path: np.resize(block, leaf.shape) for path, leaf in leaves[i::NUM_FILES]}
        tensors = weights.file_tensors(weights.unflatten(params), architecture.format)
        save_file(tensors, folder / f"model-{i + 1:05}-of-{NUM_FILES:05}.safetensors")


def measure(folder: Path, num_devices: int) -> dict[str, float]:
    """Gigabytes of loading the folder in this process."""
    import jax
    import jax.numpy as jnp

    from tspo_jax.checkpoints import weights
    from tspo_jax.checkpoints.folders import answerer_architecture
    from tspo_jax.devices import sharding

    architecture = answerer_architecture(weights.read_config(folder), folder)
    where = None
    if num_devices > 1:
        mesh = sharding.make_mesh([("data", 2), ("model", num_devices // 2)], jax.devices())
        where = sharding.answerer_sharding(mesh, CONFIG)
    before = resident("VmRSS")
    params = weights.load_params(folder, architecture.abstract, architecture.format, dtype=jnp.bfloat16, sharding=where)
    shards = [shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards]
    held, peak = sum(shards) / 1e9, resident("VmHWM")
    return {"held": held, "before": before, "peak": peak, "over": peak - before - held}


def resident(field: str) -> float:
    """A field of this process's memory, in GB: VmRSS (now) or VmHWM (peak), the mapped files included."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024 / 1e9


def define_flags() -> None:
    flags.DEFINE_string("folder", "", "Where the checkpoint is written for a while; the system's own place if empty.")
    flags.DEFINE_integer("devices", 0, "Load what is in the folder on so many devices; how the script calls itself.")


def main(_) -> None:
    args = flags.FLAGS
    if args.devices:
        print(json.dumps(measure(Path(args.folder), args.devices)))
        return
    with TemporaryDirectory(dir=args.folder or None) as folder:
        write_checkpoint(Path(folder), CONFIG)
        written = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors")) / 1e9
        rows = {}
        for name, count in MESHES.items():
            command = [sys.executable, "-m", "benchmarks.load_memory", f"--folder={folder}", f"--devices={count}"]
            devices = f"--xla_force_host_platform_device_count={count}"
            environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": devices}
            rows[name] = json.loads(subprocess.run(command, env=environment, check=True, capture_output=True).stdout)
        print(json.dumps({"file_gb": written, **rows}, indent=1))


if __name__ == "__main__":
    define_flags()
    app.run(main)
