"""SwinBERT as published (15 epochs of MSR-VTT's 130,260 captions would be 40,700 steps), with the mask that learns.

Put a folder with log/args.json and tokenizer/vocab.txt (bert-base-uncased's) where `model` says, with Video Swin's own
file beside it; or the folder of a released model, to go on from it.
"""

from tspo_jax.captioning.config import default


def get_config():
    config = default()
    config.model = "checkpoints/swinbert"
    config.data.store = "data/captions/frames"
    config.data.captions = "data/captions/train.jsonl"
    config.mask.kind = "straight_through"
    config.num_steps = 40_700
    config.checkpoint_every = 500
    return config
