import json

import jax
import numpy as np
import pytest
from safetensors import safe_open

from tspo_jax.checkpoints import testa_folders
from tspo_jax.checkpoints.weights import Format, load_params
from tspo_jax.models.layers import abstract_module, merge_params
from tspo_jax.models.timesformer import Timesformer, TimesformerConfig, flat, merging_schedule

ALONE = Format(rename=((r"^", "visual_encoder."),), ignored=testa_folders.TESTA.ignored)


@pytest.fixture(scope="module")
def tower(golden, tmp_path_factory):
    """(schedule) -> the golden tower with it, and its parameters."""
    folder = tmp_path_factory.mktemp("tower")
    (folder / "model.safetensors").symlink_to(golden / "testa_block.safetensors")
    with safe_open(golden / "testa_block.safetensors", "numpy") as file:
        vision = json.loads(file.metadata()["config"])

    def make(numbers):
        config = testa_folders.testa_config({"vision": vision, "testa_r": numbers}).vision
        graphdef, abstract = abstract_module(lambda rngs: Timesformer(config, rngs=rngs))
        return config, graphdef, load_params(folder, abstract, ALONE)

    return make


@pytest.mark.slow
def test_golden(tower, golden):
    data = np.load(golden / "testa_block.npz")
    for i, case in enumerate(json.loads(str(data["meta"]))):
        config, graphdef, params = tower(case["r"])
        video = data[f"case{i}/video"].transpose(0, 2, 3, 4, 1)

        def run(params, video, graphdef=graphdef):
            model = merge_params(graphdef, params)
            return list(model.states(video)), model(video)

        states, tokens = jax.jit(run)(params, video)
        after = [list(pair) for pair in config.tokens_after(video.shape[1])]
        if video.shape[2] == video.shape[3]:
            assert after == case["frames_and_patches_after_each_block"]
        for j, state in enumerate(states):
            assert list(state.patches.shape[2:0:-1]) == case["frames_and_patches_after_each_block"][j]
            np.testing.assert_allclose(flat(state), data[f"case{i}/block{j}"], atol=2e-5)
            if state.sizes is not None:
                size = data[f"case{i}/block{j}_size"]
                np.testing.assert_array_equal(state.sizes[..., 0].swapaxes(1, 2), size[:, :, 1:, 0])
                np.testing.assert_array_equal(size[:, :, 0], 1)
        np.testing.assert_allclose(tokens, data[f"case{i}/tokens"], atol=2e-5)
        if f"case{i}/grad_video" in data:
            cotangent = data[f"case{i}/cotangent"]

            def weighed(video, graphdef=graphdef, params=params, cotangent=cotangent):
                return (merge_params(graphdef, params)(video) * cotangent).sum()

            gradient = jax.jit(jax.grad(weighed))(video)
            np.testing.assert_allclose(gradient.transpose(0, 4, 1, 2, 3), data[f"case{i}/grad_video"], atol=1e-4)


def test_nothing_merged_is_the_plain_tower(tower, golden):
    """Scanned blocks (no merging) give what blocks one by one give."""
    _, graphdef, params = tower([])
    video = np.random.default_rng(0).normal(size=(1, 4, 16, 16, 3)).astype(np.float32)

    def run(params, video):
        model = merge_params(graphdef, params)
        *_, last = model.states(video)
        return model(video), model.norm(flat(last))

    scanned, one_by_one = jax.jit(run)(params, video)
    np.testing.assert_allclose(scanned, one_by_one, atol=1e-6)


def test_schedules():
    assert merging_schedule("frame&patch", [1, 12], 2) == {"merging": ((1, 12), (0, 0)), "frame_flag": True}
    assert merging_schedule("frame&patch", [[1, 12], [2, 3]], 2)["merging"] == ((1, 12), (2, 3))
    assert merging_schedule("frame", [2, 3], 3) == {"merging": ((2, 0), (3, 0), (0, 0)), "frame_flag": False}
    assert merging_schedule("patch-frame", [5, 2, 7], 3)["merging"] == ((0, 5), (2, 0), (0, 7))
    for wrong in ([1] * 5, [-1, 2], [1.5], [True]):
        with pytest.raises(ValueError, match="testa_r"):
            merging_schedule("frame&patch", wrong, 2)
    with pytest.raises(ValueError, match="merging_type 'tokens'"):
        merging_schedule("tokens", [1], 2)


def test_published_schedules():
    """Reference A3: 32 x 196 -> 20 x 52, 96 x 196 -> 48 x 100."""
    for frames, numbers, last in ((32, [1, 12], (20, 52)), (96, [4, 8], (48, 100))):
        config = TimesformerConfig(num_frames=frames, **merging_schedule("frame&patch", numbers * 12, 12))
        assert config.tokens_after(frames)[-1] == last


def test_wrong_configurations():
    with pytest.raises(ValueError, match="schedule of 1 blocks for a tower of 12"):
        TimesformerConfig(merging=((1, 2),))
    with pytest.raises(ValueError, match="learnable_temporal_scaling"):
        TimesformerConfig(depth=1, merging=((1, 2),), learnable_temporal_scaling=True)
    with pytest.raises(ValueError, match="no multiple of patch_size"):
        TimesformerConfig(image_size=100)
