"""Settings of preference training that contradict themselves."""

import pytest

from tspo_jax import config as cfg
from tspo_jax.tpo import config as tpo_config
from tspo_jax.tpo.config import TpoConfig


@pytest.mark.parametrize(
    "path, value, said",
    [
        ("accumulate", 3, "accumulate is 3: it must divide batch_size"),
        ("batch_size", 0, "must be at least 1"),
        ("reference.mode", "twice", "not stored, online or"),
        ("data.answer_buckets", (32, 8), "must ascend"),
        ("data.answer_text", "x", "must hold {answer}"),
        ("optimizer.warmup", 1.0, "warmup is 1.0"),
        ("build.attempts", 0, "build.attempts is 0, it must be at least 1"),
    ],
)
def test_contradictions(path, value, said):
    config = tpo_config.default()
    with config.unlocked():
        config.update_from_flattened_dict({path: value})
    with pytest.raises(cfg.ConfigError, match=said):
        cfg.read(config, TpoConfig)


def test_reference_of_full_training_is_stored():
    config = tpo_config.default()
    assert cfg.read(config, TpoConfig).is_online
    config.full = True
    assert not cfg.read(config, TpoConfig).is_online
    config.reference.mode = "online"
    with pytest.raises(cfg.ConfigError, match="take stored"):
        cfg.read(config, TpoConfig)
