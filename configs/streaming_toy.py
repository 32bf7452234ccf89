"""A streaming encoder on the toy world: minutes on two cores. Paths are those of launch/quickstart.sh."""

from tspo_jax.streaming.config import default


def get_config():
    config = default()
    config.answerer.folder = "tspo_jax/toy/checkpoints/llava_video"
    config.answerer.dtype = "float32"
    config.data.store = "toy_data/frames"
    config.data.questions = "toy_data/train.jsonl"
    config.data.clips = 8
    config.data.decode_threads = 4
    config.encoder.frames = 4
    config.encoder.cells = 1
    config.encoder.width = 96
    config.encoder.num_layers = 2
    config.encoder.num_heads = 4
    config.encoder.num_kv_heads = 2
    config.encoder.hidden = 192
    config.encoder.selected = 2
    config.optimizer.learning_rate = 2e-3
    config.num_steps = 400
    config.log_every = 10
    return config
