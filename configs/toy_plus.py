"""The toy world's study with what gained most there (docs/ablations.md): the question-aware agent, a start on labels,
graded rewards.

`:quick` after the file's name is the same recipe on the quickstart's videos and in its time: fewer steps, most on
labels, which cost no answers.
"""

from configs import llava_video_7b_plus, toy, toy_full


def get_config(variant=""):
    if variant not in ("", "quick"):
        raise ValueError(f"variant {variant!r}: there is quick, or none")
    config = toy.get_config() if variant else toy_full.get_config()
    llava_video_7b_plus.extend(config)
    config.num_steps, config.policy.warm_start_steps = (450, 400) if variant else (1500, 1200)
    config.optimizer.learning_rate = 3e-3
    if variant:
        config.held_out.every = 150
    return config
