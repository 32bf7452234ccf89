"""The paper's run: TSPO-10K, CLIP ViT-L/14, LLaVA-Video-7B frozen; 10,000 questions once each in 625 steps.

Put the checkpoint folders and the data where the fields say, or name other places on the command line. A machine
without room for 7B: another answerer (docs/training.md), everything else stays; or
`--config=configs/llava_video_7b.py:laptop`, a few steps of this run with the models and videos of the toy world.
"""

from configs import toy
from tspo_jax.config import default


def get_config(variant=""):
    config = default()  # the paper's hyperparameters
    config.answerer.max_new_tokens = 16  # the answer is a letter; the original waits for up to 256 tokens
    config.answerer.prefill_chunk = 1  # a prompt with 16 frames has 3,360 visual tokens
    if variant == "laptop":
        return shrink(config)
    if variant:
        raise ValueError(f"variant {variant!r}: there is laptop, or none")
    config.agent.clip = "checkpoints/clip-vit-large-patch14"
    config.answerer.folder = "checkpoints/LLaVA-Video-7B-Qwen2"
    config.data.store = "data/tspo_10k/frames"
    config.data.questions = "data/tspo_10k/tspo_10k.jsonl"
    config.mesh.axes = (("data", -1), ("model", 4))  # 7B has 4 key and value heads
    return config


def shrink(config):
    """A run with its own hyperparameters on the quickstart's tiny models and videos: minutes on two cores."""
    small = toy.get_config()
    config.num_steps, config.batch_size = 20, 4
    config.agent.clip = small.agent.clip
    for field in ("folder", "dtype", "option_text"):
        config.answerer[field] = small.answerer[field]
    config.data = small.data
    return config
