"""Needle samples: sizes, order, mask, distractors, and that (seed, index) decides everything."""

import numpy as np
import pytest

from tspo_jax.data.needle import NeedleConfig, compose

LENGTHS = np.array([60, 200, 7, 90, 128])
TARGET = 1
FRAMES = np.linspace(0, 199, 128, dtype=int)


DEFAULT = NeedleConfig()


def samples(count=300, config=DEFAULT, target_frames=FRAMES):
    return [compose(5, index, TARGET, target_frames, LENGTHS, config) for index in range(count)]


def groups(sample, size=50):
    return zip(*(x.reshape(-1, size) for x in (sample.video, sample.frame, sample.mask)), strict=True)


def test_sizes_of_the_released_code():
    counts = []
    for sample in samples():
        assert sample.video.dtype == sample.frame.dtype == np.int32 and sample.mask.dtype == bool
        true = int(sample.mask.sum())
        counts.append(true // 50)
        assert true % 50 == 0 and len(sample.mask) == true + 12 * 50
    shares = np.bincount(counts, minlength=5)[1:] / len(counts)
    np.testing.assert_allclose(shares, 0.25, atol=0.08)


def test_mask_is_exactly_the_target():
    for sample in samples():
        np.testing.assert_array_equal(sample.mask, sample.video == TARGET)


def test_groups():
    drawn, seen = [], set()
    for sample in samples():
        for video, frame, mask in groups(sample):
            assert len(set(video)) == 1 and np.all(np.diff(frame) >= 0)
            if mask[0]:
                assert len(set(frame)) == 50 and set(frame) <= set(FRAMES)
                drawn.append(tuple(frame))
            else:
                seen.add(video[0])
                np.testing.assert_array_equal(frame, np.linspace(0, LENGTHS[video[0]] - 1, 50, dtype=int))
    assert len(set(drawn)) == len(drawn)
    assert seen == {0, 2, 3, 4}


def test_order_of_groups_is_random():
    first = np.mean([sample.mask[0] for sample in samples(1000)])
    expected = np.mean([k / (12 + k) for k in range(1, 5)])
    assert abs(first - expected) < 0.04


def test_seed_and_index_decide():
    a, b = compose(5, 3, TARGET, FRAMES, LENGTHS, NeedleConfig()), samples(4)[3]
    for field in ("video", "frame", "mask"):
        np.testing.assert_array_equal(getattr(a, field), getattr(b, field))
    others = [compose(6, 3, TARGET, FRAMES, LENGTHS, NeedleConfig()), samples(5)[4]]
    assert all(not np.array_equal(a.frame, other.frame) for other in others)


@pytest.mark.parametrize("num_candidates", [1, 20, 50])
def test_short_target(num_candidates):
    frames = np.arange(num_candidates) * 2
    for sample in samples(20, target_frames=frames):
        for _, frame, mask in groups(sample):
            if mask[0]:
                np.testing.assert_array_equal(frame, frames[np.linspace(0, num_candidates - 1, 50, dtype=int)])


def test_length_of_the_paper():
    config = NeedleConfig(distractor_groups=11, max_distractor_groups=68)
    assert config.max_frames == 72 * 50
    lengths = [len(sample.mask) for sample in samples(300, config)]
    assert min(lengths) < 800 and 3300 < max(lengths) <= 3600


def test_errors():
    with pytest.raises(ValueError, match="at least one video besides the target"):
        compose(0, 0, 0, FRAMES, LENGTHS[:1], NeedleConfig())
    for wrong in ({"min_true_groups": 5}, {"max_true_groups": 0}, {"max_distractor_groups": 3}, {"group_frames": 0}):
        with pytest.raises(ValueError):
            NeedleConfig(**wrong)
