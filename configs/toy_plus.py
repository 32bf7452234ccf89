"""The toy world's study with what gained most there (docs/ablations.md): the question-aware agent, a start on labels,
graded rewards."""

from configs import llava_video_7b_plus, toy_full


def get_config():
    config = toy_full.get_config()
    llava_video_7b_plus.extend(config)
    config.num_steps, config.policy.warm_start_steps = 1500, 1200
    config.optimizer.learning_rate = 3e-3
    return config
