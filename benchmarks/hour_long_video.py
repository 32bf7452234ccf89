"""Seconds and memory of choosing frames of an hour-long video whose features are in a frame store.

    python -m benchmarks.hour_long_video [--folder=/tmp]

Writes a TSPO folder of CLIP ViT-L's shapes with random weights in bfloat16 (0.9 GB) and a store of one video of 3,600
frames below the folder, removed again, and asks about it in a process of its own, on the CPU. Prints JSON: `load_s`,
`first_s` (compiles the programs), `question_s`, the quickest of the later questions, with reading the features and the
64 chosen frames, and its `question_cpu_s` over all cores; `weights_gb`, and `besides_gb`, all that the process holds
besides them at the worst moment of asking.
"""

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from absl import app, flags
from PIL import Image

from benchmarks.load_memory import resident

NUM_FRAMES, FPS = 3600, 25
VIT_L = dict(
    model_type="clip",
    projection_dim=768,
    text_config=dict(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, eos_token_id=49407
    ),
    vision_config=dict(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14
    ),
)


def write_agent(folder: Path, config: dict) -> Path:
    """FOLDER/agent, a TSPO folder with this config.json and random weights."""
    from tspo_jax.checkpoints import weights
    from tspo_jax.models.clip import Clip, ClipConfig
    from tspo_jax.models.layers import abstract_module
    from tspo_jax.models.temporal_agent import TemporalAgent
    from tspo_jax.toy.tokenizers import clip_tokenizer

    agent = folder / "agent"
    agent.mkdir()
    (agent / "config.json").write_text(json.dumps(config))
    width = config["projection_dim"]
    block = np.random.default_rng(0).normal(scale=0.02, size=2**20).astype(weights.BFLOAT16)
    tensors = {}
    for make, form in (
        (lambda rngs: Clip(ClipConfig.from_hf(config), rngs=rngs), weights.CLIP),
        (lambda rngs: TemporalAgent(width, num_heads=8, window=12, rngs=rngs), weights.agent_format(weights.SELECTOR)),
    ):
        shapes = weights.flatten(abstract_module(make)[1])
        params = weights.unflatten({path: np.resize(block, leaf.shape) for path, leaf in shapes.items()})
        tensors |= weights.file_tensors(params, form)
    weights.save_tensors(agent, tensors)
    clip_tokenizer(["What is shown?"], max_length=77).save_pretrained(agent)
    return agent


def write(folder: Path, config: dict) -> None:
    """FOLDER/agent, a TSPO folder with this config.json, and FOLDER/store."""
    from tspo_jax.checkpoints import weights
    from tspo_jax.data import frame_store

    agent, store = write_agent(folder, config), folder / "store"
    frame_store.open_settings(store, frame_store.StoreSettings())
    picture = io.BytesIO()
    rng = np.random.default_rng(1)
    Image.fromarray(rng.integers(0, 255, (24, 32, 3), np.uint8)).resize((682, 384)).save(picture, "JPEG", quality=95)
    numbers = np.arange(NUM_FRAMES)
    entry = frame_store.VideoEntry(
        "hour.mp4", FPS, FPS * NUM_FRAMES, numbers.astype(float), FPS * numbers, 682, 384, "none", 0, ""
    )
    entry = frame_store.write_frames(store, entry, (picture.getvalue() for _ in numbers))
    rows = frame_store.FEATURE_ROWS
    width = config["projection_dim"]
    blocks = (rng.normal(size=(len(numbers[i : i + rows]), width)) for i in range(0, NUM_FRAMES, rows))
    frame_store.write_features(store, entry, weights.checkpoint_identity(agent), blocks, width)


def measure(folder: Path, num_questions: int = 5) -> dict[str, float]:
    """Of the agent and the store of a folder, in this process."""
    import jax

    from tspo_jax.selection.choosing import picks_of, select_frames
    from tspo_jax.selection.scoring import load_scorer
    from tspo_jax.selection.video_source import open_videos

    times = [np.array([time.perf_counter(), time.process_time()])]
    scorer = load_scorer(folder / "agent")
    jax.block_until_ready(scorer.clip.params)
    times.append(np.array([time.perf_counter(), time.process_time()]))
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak of loading
    names, open_video = open_videos("", str(folder / "store"))
    for i in range(num_questions):
        source = open_video(names[0], scorer.clip)
        result = select_frames(scorer, source.candidates(), f"What is shown {i}?", 64, "topk")
        assert len(source.pictures(picks_of(result, source))) == 64
        times.append(np.array([time.perf_counter(), time.process_time()]))
    load, first, *later = np.diff(times, axis=0)
    question = np.min(later, axis=0)
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves((scorer.clip.params, scorer.agent[1]))) / 1e9
    numbers = {"load_s": load[0], "first_s": first[0], "question_s": question[0], "question_cpu_s": question[1]}
    numbers |= {"weights_gb": weights, "besides_gb": resident("VmHWM") - weights}
    return {name: round(float(value), 3) for name, value in numbers.items()}


def define_flags() -> None:
    flags.DEFINE_string("folder", "", "Where the files are written for a while; the system's own place if empty.")
    flags.DEFINE_string("measure", "", "Measure what is in this folder; how the script calls itself.")


def main(_) -> None:
    args = flags.FLAGS
    if args.measure:
        print(json.dumps(measure(Path(args.measure))))
        return
    with TemporaryDirectory(dir=args.folder or None) as folder:
        write(Path(folder), VIT_L)
        command = [sys.executable, "-m", "benchmarks.hour_long_video", f"--measure={folder}"]
        subprocess.run(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, check=True)


if __name__ == "__main__":
    define_flags()
    app.run(main)
