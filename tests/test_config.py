"""Reading a config: every field exactly once, of its type; overrides of fields that do not exist."""

import dataclasses

import pytest

from tspo_jax import config as cfg
from tspo_jax.config import Config, ConfigError


def test_default_round_trips():
    assert cfg.read(cfg.default()) == Config()
    changed = cfg.default()
    changed.optimizer.learning_rate = 1.0
    changed.mesh.axes = [["data", 2], ["model", 4]]
    read = cfg.read(changed.to_dict())
    assert read.optimizer.learning_rate == 1.0
    assert read.mesh.axes == (("data", 2), ("model", 4))
    with pytest.raises(dataclasses.FrozenInstanceError):
        read.seed = 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: c["optimizer"].update(learnin_rate=1.0),
            "config.optimizer.learnin_rate does not exist; did you mean",
        ),
        (lambda c: c.update(zzz=1), "config.zzz does not exist; the fields of config are seed, batch_size"),
        (lambda c: c["policy"].pop("tau_end"), "config.policy.tau_end is missing"),
        (lambda c: c.update(seed="1"), "config.seed is '1', which is not of type int"),
        (lambda c: c.update(batch_size=True), "config.batch_size is True, which is not of type int"),
        (lambda c: c["policy"].update(group_size=1), "config.policy.group_size is 1, it must be at least 2"),
        (lambda c: c["answerer"].update(dtype="int8"), "config.answerer.dtype is 'int8', not one of bfloat16, float32"),
        (lambda c: c.update(data=3), "config.data is 3, not a group of fields"),
        (lambda c: c["data"].update(buckets=128), "config.data.buckets is 128, which is not of type tuple.int, ...."),
        (lambda c: c["data"].update(buckets=("a",)), r"config.data.buckets is \('a',\), which is not of type"),
        (lambda c: c["mesh"].update(axes=(("data", 1, 2),)), "config.mesh.axes is .*, which is not of type tuple"),
    ],
)
def test_bad_configs(change, message):
    values = cfg.default().to_dict()
    change(values)
    with pytest.raises(ConfigError, match=message):
        cfg.read(values)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--config.optimizer.learnin_rate=1", "did you mean learning_rate"),
        ("--config.optimiser.learning_rate=1", "config.optimiser does not exist; did you mean optimizer"),
        ("--config.seed.x=1", "config.seed.x does not exist"),
        ("--config=configs/absent.py", "configs/absent.py: no such file"),
    ],
)
def test_bad_overrides(override, message):
    with pytest.raises(ConfigError, match=message):
        cfg.check_overrides(["train", override])


@dataclasses.dataclass(frozen=True)
class Regression(cfg.General):
    """The config of another trainer."""

    degree: int = 3
    optimizer: cfg.Optimizer = cfg.group(cfg.Optimizer)


def test_the_config_of_another_trainer():
    values = cfg.default(Regression)
    assert cfg.read(values, Regression) == Regression() and values.num_steps == 1000
    values.degree, values.optimizer.b1 = 2, 0.5
    assert cfg.read(values, Regression) == Regression(degree=2, optimizer=cfg.Optimizer(b1=0.5))
    with pytest.raises(ConfigError, match="config.degree does not exist"):
        cfg.read(values, Config)
    with pytest.raises(ConfigError, match="config.num_steps is 0, it must be at least 1"):
        cfg.read({**values.to_dict(), "num_steps": 0}, Regression)
    cfg.check_overrides(["x", "--config.degree=4", "--config.mesh.axes=()"], Regression)
    with pytest.raises(ConfigError, match="config.policy does not exist"):
        cfg.check_overrides(["x", "--config.policy.kl=1"], Regression)


def test_good_overrides():
    cfg.check_overrides(["train", "--run_dir=x", "--config.data.specific.k=4", f"--config={__file__}"])
