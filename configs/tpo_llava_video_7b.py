"""LLaVA-Video-TPO (arXiv 2501.13919): LLaVA-Video-7B prefers answers made with the evidence, 10,000 pairs once each.

Adapters (LoRA) are trained; `--config=configs/tpo_llava_video_7b.py:full` trains language model and projector, as the
paper does. Put the checkpoint folder and the data where the fields say, or name other places on the command line.
`:laptop` is a few steps of it with the model and the videos of the toy world.
"""

from configs import tpo_toy
from tspo_jax.tpo.config import default


def get_config(variant=""):
    config = default()
    if variant == "laptop":
        small = tpo_toy.get_config()
        for name in ("answerer", "build", "data", "batch_size"):
            config[name] = small[name]
        config.num_steps = 12
        return config
    if variant not in ("", "full"):
        raise ValueError(f"variant {variant!r}: there are full and laptop, or none")
    config.answerer.folder = "checkpoints/LLaVA-Video-7B-Qwen2"
    config.answerer.max_new_tokens = 16  # of the answers that pairs are made of
    config.answerer.prefill_chunk = 1
    config.build.questions = "data/llava_video_178k/train.jsonl"
    config.build.output = "data/tpo"
    config.build.recipes = ("incomplete",)  # LLaVA-Video-TPO's; LongVA-TPO has both in equal parts
    config.build.frames, config.build.sparse_frames = 64, 8
    config.data.store = "data/llava_video_178k/frames"
    config.data.pairs = "data/tpo/train.jsonl"
    config.data.held_out = "data/tpo/heldout.jsonl"
    config.held_out.every = 25
    config.mesh.axes = (("data", -1), ("model", 4))  # 7B has 4 key and value heads
    config.accumulate = 16  # 4 pairs at a time
    config.checkpoint_every = 25
    if variant == "full":
        config.full = True
        config.mesh.split_over_data = True
        config.keep_checkpoints = 1  # 92 GB each
    return config
