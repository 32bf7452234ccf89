import json

import numpy as np
import pytest

from tspo_jax.selection import methods as selection


@pytest.mark.parametrize("method", ["topk", "bin-max", "aks"])
def test_golden_scores(golden, method):
    for case in json.loads((golden / "selection.json").read_text()):
        picks = selection.METHODS[method](np.float32(case["scores"]), case["k"])
        assert picks.tolist() == case[method.replace("-", "_")]


@pytest.mark.parametrize("method", ["topk", "bin-max", "aks"])
def test_golden_video(golden, method):
    data = np.load(golden / "tspo_agent.npz")
    for case in (0, 1):
        picks = selection.select(method, data[f"case{case}/scores"], data[f"case{case}/clip_scores"], k=16)
        np.testing.assert_array_equal(data["candidate_idx"][picks], data[f"case{case}/{method}"])


def test_topk_prefers_the_first_of_equal_scores():
    assert selection.topk(np.array([1.0, 2, 1, 2, 1]), 3).tolist() == [0, 1, 3]


def test_bin_max_by_hand():
    # 10 frames, 5 bins: centres 0, 2, 4 (4.5 rounds to even), 7, 9; frames 1, 3 and 8 lie between two centres.
    scores = np.zeros(10)
    assert selection.bin_max(scores, 5).tolist() == [0, 2, 4, 6, 9]
    scores[[1, 3, 8]] = 1
    assert selection.bin_max(scores, 5).tolist() == [1, 3, 4, 8, 9]
    assert selection.bin_max(np.array([0.0, 3, 3, 1]), 1).tolist() == [1]


def test_bin_max_gives_k_frames_for_every_length():
    rng = np.random.default_rng(0)
    for num_frames in range(1, 60):
        for k in range(1, num_frames + 1):
            picks = selection.bin_max(rng.normal(size=num_frames), k)
            assert len(set(picks.tolist())) == k


def test_aks_by_hand():
    # The first half is flat and is halved down to 4 frames each, one pick from each; the second half stands
    # out from its mean and gives its 4 best.
    scores = np.ones(32)
    scores[26:] = 0
    assert selection.aks(scores, 8).tolist() == [0, 4, 8, 12, 16, 17, 18, 19]


def test_aks_with_few_frames_or_none_to_spare():
    flat = np.zeros(32)
    assert selection.aks(flat, 4).tolist() == [0, 8, 16, 24]  # depth limited to 2
    assert selection.aks(flat, 1).tolist() == [0]
    assert selection.aks(flat, 12).tolist() == list(range(0, 32, 4))  # int(12 / 8) frames of 8 segments


def test_uniform():
    assert selection.uniform(np.zeros(10), 4).tolist() == [0, 3, 6, 9]
    assert selection.uniform(np.zeros(8), 4).tolist() == [0, 2, 4, 7]  # truncated, not rounded
    assert selection.uniform(np.zeros(10), 1).tolist() == [0]


@pytest.mark.parametrize("method", selection.METHODS)
@pytest.mark.parametrize("num_frames", [1, 2, 7, 8])
def test_short_videos_keep_every_frame(method, num_frames):
    scores = np.random.default_rng(0).normal(size=num_frames)
    assert selection.select(method, scores, scores, k=8).tolist() == list(range(num_frames))


@pytest.mark.parametrize("method", selection.METHODS)
def test_picks_ascend_without_repeats(method):
    scores = np.random.default_rng(1).normal(size=(2, 97))
    for k in (1, 3, 8, 64):
        picks = selection.select(method, *scores, k)
        assert (np.diff(picks) > 0).all() and 1 <= len(picks) <= k
        assert picks.min() >= 0 and picks.max() < 97
        assert len(picks) == k or method == "aks"


def test_only_clip_topk_looks_at_clip_scores():
    scores, clip_scores = np.array([3.0, 2, 1, 0]), np.array([0.0, 1, 2, 3])
    assert selection.select("topk", scores, clip_scores, 2).tolist() == [0, 1]
    assert selection.select("clip-topk", scores, clip_scores, 2).tolist() == [2, 3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("top", [1.0], [1.0], 1), "method is 'top', not one of topk"),
        (("topk", [1.0], [1.0], 0), "num_frames is 0"),
        (("topk", [], [], 1), "no candidate frame"),
        (("topk", [1.0, np.nan], [1.0, 1.0], 1), "scores of 1 candidate frames are not finite"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        selection.select(*arguments)


def test_fill_evenly():
    assert selection.fill_evenly(np.array([50, 51]), 101, 5).tolist() == [0, 25, 50, 51, 100]
    assert selection.fill_evenly(np.array([2]), 3, 5).tolist() == [0, 1, 2]
    assert selection.fill_evenly(np.arange(4), 100, 4).tolist() == [0, 1, 2, 3]
