"""What each family says of itself fits its network: a name and a split for every parameter, a place for the video."""

import json

import jax
import pytest
from conftest import ROOT

from tspo_jax.checkpoints import weights
from tspo_jax.checkpoints.folders import answerer_architecture
from tspo_jax.devices import sharding
from tspo_jax.models import llava_video, qwen2_5_vl, qwen3_vl
from tspo_jax.models.video_tags import IMAGE_TAG, VIDEO_TAG

DESCRIBED = {
    "LLaVA-Video-7B-Qwen2": llava_video.FAMILY,
    "Qwen2.5-VL-7B-Instruct": qwen2_5_vl.FAMILY,
    "Qwen3-VL-8B-Instruct": qwen3_vl.FAMILY,
}


@pytest.mark.parametrize("name", DESCRIBED)
def test_a_family_is_complete(name):
    family = DESCRIBED[name]
    description = json.loads((ROOT / "configs" / "architectures" / f"{name}.json").read_text())
    architecture = answerer_architecture(description, name)
    assert description["model_type"] in family.model_types and architecture.template == family.template
    leaves = weights.flatten(architecture.abstract)
    mesh = sharding.make_mesh([("data", 2), ("model", 4)], jax.devices())
    where = sharding.answerer_sharding(mesh, description, split_over_data=True)
    names = []
    for path, leaf in leaves.items():
        where(path, leaf.shape)  # raises where no rule is its
        names += architecture.format.file_names(path, leaf.shape)
    assert len(names) == len(set(names)), "two parameters would be one tensor of the file"
    for node in family.stacked:
        assert any(node in path.split(".") for path in leaves)
    for prefix in family.tower:
        assert any(path.startswith(prefix) for path in leaves)
    for text in family.templates.values():
        assert text.count("{text}") == 1 and text.count(IMAGE_TAG) + text.count(VIDEO_TAG) == 1
