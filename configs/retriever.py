"""TESTA's fine-tuning for retrieval, from BLIP of Hugging Face: 32 frames, one frame and twelve patches merged in every
block."""

from tspo_jax.retrieval.config import default


def get_config():
    config = default()
    config.model = "checkpoints/blip-itm-base-coco"
    config.num_frames = 32
    config.testa_r = (1, 12) * 12
    config.data.store = "data/captions/frames"
    config.data.captions = "data/captions/train.jsonl"
    config.num_steps = 3000
    config.checkpoint_every = 250
    return config
