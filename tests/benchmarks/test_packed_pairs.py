"""The benchmark of packed pairs: both forms have the same gradient; memory is measured in tokens."""

import pytest

from benchmarks import packed_pairs
from tspo_jax import config as cfg
from tspo_jax.tpo import config as tpo_config
from tspo_jax.tpo.config import TpoConfig


@pytest.mark.slow
def test_both_forms_have_the_same_gradient(golden):
    config = tpo_config.default()
    config.answerer.folder = str(golden / "llava_video_grid")
    found = packed_pairs.seconds(cfg.read(config, TpoConfig), batch_size=2, num_frames=2, num_steps=1)
    assert found["packed"] > 0 and found["separate"] > 0
    assert found["largest_difference"] < 1e-6
