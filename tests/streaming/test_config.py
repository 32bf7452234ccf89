import pytest

from tspo_jax import config as cfg
from tspo_jax.streaming.config import StreamingTraining, default


def test_fields_that_make_no_sense():
    assert cfg.read(default(), StreamingTraining) == StreamingTraining()
    for field, value, message in (
        ("stage", "both", "not one of clip, video"),
        ("labelled_steps", 5, "of stage video"),
        ("init", "runs/clip", "of stage video"),
    ):
        config = default()
        config[field] = value
        with pytest.raises(cfg.ConfigError, match=message):
            cfg.read(config, StreamingTraining)
    config = default()
    config.data.clips = 0
    with pytest.raises(cfg.ConfigError, match="clips is 0"):
        cfg.read(config, StreamingTraining)
