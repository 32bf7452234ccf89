import jax
import numpy as np
import pytest

from tspo_jax.checkpoints.swinbert_folders import load_captioner
from tspo_jax.models.layers import merge_params
from tspo_jax.models.video_swin import VideoSwinConfig, bias_index, effective_window, shift_mask


@pytest.fixture(scope="module")
def captioner(golden):
    return load_captioner(golden / "swinbert_tiny")


def test_golden(captioner, golden):
    data = np.load(golden / "swinbert_tiny.npz")

    @jax.jit
    def run(params, frames):
        backbone = merge_params(captioner.graphdef, params).swin.backbone
        states = backbone.states(captioner.processor.normalize(frames))
        return states, backbone.norm(states[-1])

    states, features = run(captioner.params, data["frames"])
    names = ["patch_embed", *(f"stage{i}" for i in range(len(states) - 1))]
    for name, state in zip(names, states, strict=True):
        np.testing.assert_allclose(state[0], data[f"swin/{name}"], atol=2e-5, err_msg=name)
    np.testing.assert_allclose(features, data["swin/features"], atol=2e-5)
    extra = {name.split("/")[0] for name in data.files if name.startswith("swin_extra")}
    for name in sorted(extra):
        frames = data[f"{name}/frames"][None]
        features = run(captioner.params, frames)[1]
        np.testing.assert_allclose(features[0], data[f"{name}/features"], atol=2e-5, err_msg=name)
        assert features.shape[1:4] == captioner.config.swin.grid(*frames.shape[1:4])


def test_published_sizes():
    config = VideoSwinConfig()
    assert config.width == 1024
    assert config.grid(32, 224, 224) == (16, 7, 7)
    assert bias_index(config.window_size).max() == 15 * 13 * 13 - 1


def test_windows():
    assert effective_window((6, 16, 2), (8, 7, 7)) == ((6, 7, 2), (0, 3, 0))
    mask = shift_mask((4, 4, 2), (2, 4, 2), (1, 0, 0))
    assert mask.shape == (2, 16, 16)
    assert (mask[0] == 0).all()  # of two windows in time, only the one that the ends meet in is cut
    assert (mask[1, :8, 8:] == -100).all() and (mask[1, :8, :8] == 0).all()


def test_wrong_configurations():
    with pytest.raises(ValueError, match="depths"):
        VideoSwinConfig(depths=(2, 2))
    with pytest.raises(ValueError, match="unknown fields width"):
        VideoSwinConfig.from_json({"width": 3})
    with pytest.raises(ValueError, match="qkv_bias"):
        VideoSwinConfig.from_json({"qkv_bias": False})
