"""Preference training on the toy world: minutes on two cores. Paths are those of launch/quickstart.sh."""

from tspo_jax.tpo.config import default

CHECKPOINTS = "tspo_jax/toy/checkpoints"


def get_config():
    config = default()
    config.answerer.folder = f"{CHECKPOINTS}/llava_video"
    config.answerer.dtype = "float32"
    config.answerer.max_new_tokens = 5
    config.build.questions = "toy_data/train.jsonl"
    config.build.output = "toy_data/pairs"
    config.build.batch_size = 32
    config.data.store = "toy_data/frames"
    config.data.pairs = "toy_data/pairs/train.jsonl"
    config.data.held_out = "toy_data/pairs/heldout.jsonl"
    config.data.num_frames = 64  # nearly all evidence is among so many; the answerer was trained on at most 16
    config.data.cached_videos = 300  # all of them
    config.data.answer_text = " {answer}"  # it begins with a space
    config.data.answer_buckets = (8, 32)
    config.data.decode_threads = 4
    config.num_steps = 300
    config.batch_size = 16
    config.lora.r = 16
    config.lora.alpha = 32.0
    config.optimizer.lora_rate = 2e-3  # a network 64 wide takes more than one of 3,584
    config.held_out.every = 100
    config.held_out.num_pairs = 352
    config.held_out.accuracy = True
    config.log_every = 5
    return config
