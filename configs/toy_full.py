"""The study behind the README's toy numbers: the quickstart's run, longer; run it with several --config.seed."""

from configs import toy


def get_config():
    config = toy.get_config()
    config.num_steps = 600
    config.log_every = 20
    config.checkpoint_every = 100
    return config
