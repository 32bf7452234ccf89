"""The trainer's programs as shapes, at full width and two layers, on a mesh of CPU devices."""

import importlib

import jax
import jax.numpy as jnp
import pytest
from conftest import ROOT

from tspo_jax import config as cfg
from tspo_jax.checkpoints.architectures import read_architecture, shallow
from tspo_jax.checkpoints.folders import answerer_architecture
from tspo_jax.devices import sharding
from tspo_jax.tpo.ahead_of_time import training_step
from tspo_jax.tpo.config import TpoConfig

DESCRIPTIONS = ROOT / "configs" / "architectures"


@pytest.mark.parametrize("variant, programs", [("", {"update"}), ("full", {"update", "reference"})])
def test_shapes_of_a_step(variant, programs, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    values = importlib.import_module("configs.tpo_llava_video_7b").get_config(variant)
    values.batch_size, values.accumulate, values.data.num_frames = 8, 4, 4
    config = cfg.read(values, TpoConfig)
    description, path = read_architecture(config.answerer.folder, DESCRIPTIONS)
    answerer = answerer_architecture(shallow(description, 2), path)
    mesh = sharding.make_mesh(config.mesh.axes, jax.devices())
    calls = training_step(config, answerer, mesh)
    assert set(calls) == programs
    state, frozen, pairs = calls["update"].args
    assert pairs.frames.shape[:2] == (8, 4) and pairs.answers.shape == (8, 2, 128)
    new_state, metrics = jax.eval_shape(calls["update"].program, state, frozen, pairs)
    jax.tree.map(lambda a, b: a.shape == b.shape or pytest.fail(f"{a} {b}"), new_state, state)
    assert metrics["loss"].shape == ()
    kernel = state.trained["language_model"]["layers"]["mlp"]["gate_proj"]
    if variant == "full":
        assert kernel["kernel"].dtype == jnp.float32 and tuple(kernel["kernel"].sharding.spec) == (
            None,
            "data",
            "model",
        )
        assert frozen.keys() == {"vision_tower"}
    else:
        assert kernel.keys() == {"lora_A", "lora_B"} and kernel["lora_B"]["kernel"].sharding.spec[2] == "model"
        assert frozen["language_model"]["layers"]["mlp"]["gate_proj"]["kernel"].dtype == jnp.bfloat16
