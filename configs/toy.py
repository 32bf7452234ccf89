"""The quickstart's run on the toy world: minutes on two cores. Paths are those of launch/quickstart.sh."""

from tspo_jax.config import default

CHECKPOINTS = "tspo_jax/toy/checkpoints"


def get_config():
    config = default()
    config.num_steps = 150
    config.batch_size = 8
    config.optimizer.learning_rate = 2e-3  # the paper's 5e-4 is for a width of 768; the tiny CLIP's is 128
    config.agent.clip = f"{CHECKPOINTS}/clip"
    config.answerer.folder = f"{CHECKPOINTS}/llava_video"
    config.answerer.dtype = "float32"
    config.answerer.max_new_tokens = 5
    config.answerer.option_text = " {letter}"  # it answers " with tree red B"
    config.answerer.question_chunk = 1
    config.data.store = "toy_data/frames"
    config.data.questions = "toy_data/train.jsonl"
    config.data.min_frames = 0  # toy videos are used whole: 60 to 240 frames
    config.data.max_frames = 256
    config.data.specific.k = 8
    config.data.buckets = (256, 832)
    config.data.decode_threads = 4
    config.evaluation.questions = "toy_data/eval.jsonl"
    config.evaluation.budgets = (8,)
    config.evaluation.batch_size = 32
    config.held_out.every = 50
    config.held_out.num_questions = 64
    config.log_every = 5
    return config
