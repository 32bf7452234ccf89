"""The study behind the README's toy numbers (benchmarks/toy_study.py): a longer run, evaluated on videos of its own."""

from configs import toy


def get_config():
    config = toy.get_config()
    config.num_steps = 1000
    config.optimizer.learning_rate = 1e-3
    config.evaluation.store = "toy_held_out/frames"
    config.evaluation.questions = "toy_held_out/eval.jsonl"
    config.held_out.every = 0
    config.log_every = 20
    config.checkpoint_every = 100
    return config
