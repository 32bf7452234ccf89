"""What is checked before and at the first step; tests/test_train_answerer.py trains."""

import dataclasses

import numpy as np
import pytest

from tspo_jax import config as cfg
from tspo_jax.tpo import config as tpo_config
from tspo_jax.tpo import training
from tspo_jax.tpo.config import TpoConfig
from tspo_jax.tpo.programs import State


def config_of(**changes) -> TpoConfig:
    config = tpo_config.default()
    config.update_from_flattened_dict(changes)
    return cfg.read(config, TpoConfig)


def test_rates_of_adapters_and_of_the_whole():
    rates = [training.learning_rates(config_of(full=full)) for full in (False, True)]
    assert [float(rate(16)) for rate in rates] == pytest.approx([1e-5, 3e-7])
    assert float(rates[0](0)) == 0


def test_a_disk_that_is_too_small_is_told(tmp_path, monkeypatch):
    state = State({"a": np.zeros(2**20, np.float32)}, {"m": np.zeros(2**21, np.float32)})
    usage = dataclasses.make_dataclass("Usage", ["free"])
    monkeypatch.setattr(training.shutil, "disk_usage", lambda _: usage(47 * 2**20))
    with pytest.raises(ValueError, match=r"4 checkpoints of 0.0 GiB .*keep_checkpoints=3.* are free"):
        training.check_disk(config_of(), tmp_path / "run", state)
    training.check_disk(config_of(keep_checkpoints=2), tmp_path / "run", state)


def test_rewards_must_be_0_at_the_first_step():
    row = {"step": 1, "tokens/chosen": 5.0, "tokens/rejected": 5.0, "logps/rejected": -9.0, "ref_logps/rejected": -9.0}
    row |= {"logps/chosen": -10.0, "ref_logps/chosen": -9.8}
    training.check_first_step(config_of(), row)  # bfloat16: 0.04 a token
    for config in (config_of(**{"answerer.dtype": "float32"}), config_of(**{"reference.tolerance": 0.01})):
        with pytest.raises(ValueError, match="rewards are not 0 at the first step.*chosen answers.*0.04 a token"):
            training.check_first_step(config, row)
        training.check_first_step(config, row | {"step": 2})
