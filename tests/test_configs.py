"""Every file in configs/ is complete; the paper's has the paper's numbers."""

import importlib
from pathlib import Path

import pytest
from conftest import ROOT

from tspo_jax import config as cfg
from tspo_jax.captioning.config import CaptioningConfig
from tspo_jax.retrieval.config import RetrievalConfig
from tspo_jax.streaming.config import StreamingTraining
from tspo_jax.tpo.config import TpoConfig

NAMES = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))
OF_PAIRS = [name for name in NAMES if name.startswith("tpo_")]
OF_STREAMS = [name for name in NAMES if name.startswith("streaming_")]
OTHERS = ["captioner", "retriever"]
NAMES = [name for name in NAMES if name not in OF_PAIRS + OF_STREAMS + OTHERS]


def test_captioner(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    config = cfg.read(importlib.import_module("configs.captioner").get_config(), CaptioningConfig)
    assert config.model and config.data.store and config.data.captions
    # The published optimiser.
    optimizer = config.optimizer
    assert (optimizer.learning_rate, optimizer.swin_rate, optimizer.weight_decay) == (3e-4, 0.05, 0.2)


def test_retriever(monkeypatch):
    """TESTA's schedule: 32 frames of 196 patches become 20 of 52."""
    monkeypatch.syspath_prepend(ROOT)
    config = cfg.read(importlib.import_module("configs.retriever").get_config(), RetrievalConfig)
    assert config.model and config.data.store and config.data.captions
    assert (config.num_frames, config.testa_r) == (32, (1, 12) * 12)


@pytest.mark.parametrize("name", NAMES)
def test_config_is_complete(name, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    config = cfg.read(importlib.import_module(f"configs.{name}").get_config())
    for field in (config.agent.clip, config.answerer.folder, config.data.store, config.data.questions):
        assert field, "a config names its folders"
    assert max(config.data.buckets) >= config.data.max_frames
    specific = config.data.specific
    longest_needle = specific.group_frames * (specific.max_true_groups + specific.max_distractor_groups)
    assert max(config.data.buckets) >= longest_needle


@pytest.mark.parametrize(
    "name", ["llava_video_7b", "llava_video_7b_plus", "llava_video_72b", "qwen2_5_vl_7b", "qwen3_vl_8b"]
)
def test_laptop_variant(name, monkeypatch):
    """The toy world's models and data, all else as in the run itself."""
    monkeypatch.syspath_prepend(ROOT)
    module = importlib.import_module(f"configs.{name}")
    full, small, toy = (
        cfg.read(c)
        for c in (module.get_config(), module.get_config("laptop"), importlib.import_module("configs.toy").get_config())
    )
    assert (small.policy, small.optimizer, small.agent.window) == (full.policy, full.optimizer, full.agent.window)
    assert (small.answerer.folder, small.data.store) == (toy.answerer.folder, toy.data.store)
    assert small.num_steps * small.batch_size < 100
    with pytest.raises(ValueError, match="variant 'desktop': there is laptop, or none"):
        module.get_config("desktop")


def test_quick_variant(monkeypatch):
    """The recipe of toy_plus on what the quickstart makes, evaluated as the paper's agent is there."""
    monkeypatch.syspath_prepend(ROOT)
    plus = importlib.import_module("configs.toy_plus")
    full, quick = cfg.read(plus.get_config()), cfg.read(plus.get_config("quick"))
    toy = cfg.read(importlib.import_module("configs.toy").get_config())
    assert (quick.agent, quick.optimizer, quick.data.general) == (full.agent, full.optimizer, full.data.general)
    assert quick.policy.advantage == full.policy.advantage
    assert 0 < quick.policy.warm_start_steps < quick.num_steps < full.num_steps
    assert (quick.evaluation, quick.answerer, quick.data.store) == (toy.evaluation, toy.answerer, toy.data.store)
    with pytest.raises(ValueError, match="variant 'slow': there is quick, or none"):
        plus.get_config("slow")


@pytest.mark.parametrize("name", OF_PAIRS)
def test_config_of_preference_training(name, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    module = importlib.import_module(f"configs.{name}")
    config = cfg.read(module.get_config(), TpoConfig)
    for field in (config.answerer.folder, config.data.store, config.data.pairs, config.build.questions):
        assert field, "a config names its folders"
    assert config.build.output == str(Path(config.data.pairs).parent)


def test_published_preference_training(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    module = importlib.import_module("configs.tpo_llava_video_7b")
    config = cfg.read(module.get_config("full"), TpoConfig)
    assert 10_000 <= config.num_steps * config.batch_size < 10_000 + config.batch_size
    assert (config.preference.beta, config.preference.gamma, config.optimizer.full_rate) == (0.2, 1.0, 3e-7)
    assert config.full and config.build.recipes == ("incomplete",)
    small, toy = (
        cfg.read(c, TpoConfig)
        for c in (module.get_config("laptop"), importlib.import_module("configs.tpo_toy").get_config())
    )
    assert (small.preference, small.answerer.folder) == (config.preference, toy.answerer.folder)
    with pytest.raises(ValueError, match="there are full and laptop"):
        module.get_config("desktop")


def test_a_variant_is_named_behind_the_file():
    cfg.check_overrides(["train", f"--config={ROOT}/configs/llava_video_7b.py:laptop"])
    with pytest.raises(cfg.ConfigError, match="no such file"):
        cfg.check_overrides(["train", "--config=configs/none.py:laptop"])


def test_paper_hyperparameters(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    config = cfg.read(importlib.import_module("configs.llava_video_7b").get_config())
    assert config.num_steps * config.batch_size == 10_000
    assert (config.policy.group_size, config.data.specific.k, config.data.general.k) == (8, 16, 8)
    assert (config.policy.tau_start, config.policy.tau_end) == (0.025, 0.01)
    assert (config.optimizer.learning_rate, config.optimizer.max_grad_norm) == (5e-4, 1.0)
    assert (config.agent.window, config.policy.advantage, config.policy.log_prob) == (12, "grpo", "independent")


def fields(config, prefix=""):
    """Path of a field -> its value."""
    found = {}
    for name, value in config.items():
        found |= fields(value, f"{prefix}{name}.") if hasattr(value, "items") else {prefix + name: value}
    return found


@pytest.mark.parametrize(
    "plus, base, further",
    [
        ("llava_video_7b_plus", "llava_video_7b", set()),
        ("toy_plus", "toy_full", {"num_steps", "policy.warm_start_steps", "optimizer.learning_rate"}),
    ],
)
def test_plus_adds_to_the_papers_run(plus, base, further, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    ours, papers = (fields(importlib.import_module(f"configs.{name}").get_config()) for name in (plus, base))
    rewards = {f"data.{kind}.{name}" for kind in ("general", "specific") for name in ("accuracy", "probability")}
    changed = {name for name in ours if ours[name] != papers[name]}
    assert changed == {"agent.kind", "policy.advantage"} | rewards | further
    assert (ours["agent.kind"], ours["data.general.probability"]) == ("question_aware", 1.0)


@pytest.mark.parametrize("name", OF_STREAMS)
def test_streaming_config_is_complete(name, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    config = cfg.read(importlib.import_module(f"configs.{name}").get_config(), StreamingTraining)
    for field in (config.answerer.folder, config.data.store, config.data.questions):
        assert field, "a config names its folders"
    assert config.encoder.selected <= config.data.clips
