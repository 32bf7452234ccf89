"""Descriptions of models that are not there."""

import pytest
from conftest import ROOT

from tspo_jax.checkpoints.architectures import read_architecture, shallow
from tspo_jax.checkpoints.folders import answerer_architecture
from tspo_jax.checkpoints.plain_folders import CheckpointError
from tspo_jax.checkpoints.weights import flatten

DESCRIPTIONS = ROOT / "configs" / "architectures"


@pytest.mark.parametrize("name", ["LLaVA-Video-7B-Qwen2", "Qwen2.5-VL-7B-Instruct"])
def test_cut_to_two_layers(name):
    description, path = read_architecture(f"checkpoints/{name}", DESCRIPTIONS)
    leaves = flatten(answerer_architecture(shallow(description, 2), path).abstract)
    assert leaves["language_model.layers.self_attn.q_proj.kernel"].shape[0] == 2


def test_a_folder_comes_before_its_description(golden):
    _, path = read_architecture(str(golden / "llava_video_grid"), DESCRIPTIONS)
    assert path.parent.name == "llava_video_grid"


def test_neither(tmp_path):
    with pytest.raises(CheckpointError, match="there is no .*nothing.json either"):
        read_architecture(str(tmp_path / "nothing"), DESCRIPTIONS)
