"""Intervals and tests against numbers that can be worked out by hand."""

import numpy as np
import pytest

from tspo_jax.evaluation import statistics


def test_one_question_per_video_gives_the_binomial_interval():
    correct = np.arange(400) % 4 == 0
    estimate = statistics.clustered_mean(correct, [str(i) for i in range(400)])
    half = 1.96 * np.sqrt(0.25 * 0.75 / 400)
    assert estimate.value == 0.25
    np.testing.assert_allclose([estimate.low, estimate.high], [0.25 - half, 0.25 + half], atol=0.004)


def test_questions_of_one_video_do_not_count_as_independent():
    """Ten equal answers per video carry the information of one, so the interval is sqrt(10) times as wide."""
    correct = np.repeat(np.arange(40) % 2, 10)
    alone = statistics.clustered_mean(correct, np.arange(400))
    together = statistics.clustered_mean(correct, np.repeat(np.arange(40), 10))
    ratio = (together.high - together.low) / (alone.high - alone.low)
    assert ratio == pytest.approx(np.sqrt(10), rel=0.1)


def test_videos_with_more_questions_weigh_more():
    assert statistics.clustered_mean([1, 1, 1, 0], ["a", "a", "a", "b"]).value == 0.75
    estimate = statistics.clustered_mean([1, 1, 1, 0], ["a", "a", "a", "b"])
    assert (estimate.low, estimate.high) == (0.0, 1.0)


def test_one_video_has_no_interval():
    assert statistics.clustered_mean([1, 0], ["a", "a"]) == (0.5, None, None)
    difference = statistics.paired_difference([1, 1], [0, 0], ["a", "a"])
    assert difference == (1.0, None, None, 1.0) and difference.inside_noise


def test_paired_difference_needs_no_spread_between_videos():
    """Both methods vary a lot from video to video; their difference is the same in each, so it is certain."""
    rng = np.random.default_rng(0)
    base = rng.normal(size=50)
    difference = statistics.paired_difference(base + 0.1, base, np.arange(50))
    np.testing.assert_allclose(difference[:3], [0.1, 0.1, 0.1])
    assert difference.p_value == pytest.approx(2 / 10_001) and not difference.inside_noise


def test_a_difference_of_a_few_answers_is_noise():
    a, b = np.zeros(100), np.zeros(100)
    a[:12], b[6:15] = 1, 1
    difference = statistics.paired_difference(a, b, np.arange(100))
    assert difference.value == pytest.approx(0.03)
    assert difference.inside_noise and difference.p_value > 0.1


def test_results_depend_on_the_seed_alone():
    values, videos = np.arange(30) % 3 == 0, np.arange(30) // 2
    assert statistics.clustered_mean(values, videos, seed=1) == statistics.clustered_mean(values, videos, seed=1)
    assert statistics.clustered_mean(values, videos, 1, 200) != statistics.clustered_mean(values, videos, 2, 200)


def test_mcnemar():
    """8 questions only a gets right, 2 only b: 2 * (1 + 10 + 45) / 1024."""
    a = [1] * 8 + [0] * 2 + [1] * 5 + [0] * 5
    b = [0] * 8 + [1] * 2 + [1] * 5 + [0] * 5
    assert statistics.mcnemar(a, b) == pytest.approx(2 * 56 / 1024)
    assert statistics.mcnemar(a, a) == 1.0


def test_over_seeds():
    """Standard deviation 0.01, t(2) = 4.3027."""
    estimate = statistics.over_seeds([0.70, 0.71, 0.72])
    np.testing.assert_allclose(
        estimate, [0.71, 0.71 - 4.3027 * 0.01 / 3**0.5, 0.71 + 4.3027 * 0.01 / 3**0.5], rtol=1e-5
    )
    assert statistics.over_seeds([0.5]) == (0.5, None, None)


def test_lengths_that_do_not_fit():
    with pytest.raises(ValueError, match="2 values and 1 clusters"):
        statistics.clustered_mean([1, 0], ["a"])
    with pytest.raises(ValueError, match="at least one"):
        statistics.clustered_mean([], [])


def test_churn_floor():
    """100 of 400 answers flip, one per video: standard deviation sqrt(100) / 400; in one video, all go together."""
    flips = np.arange(400) < 100
    assert statistics.churn_floor(flips, np.arange(400)) == pytest.approx(1.96 * 10 / 400, rel=1e-3)
    assert statistics.churn_floor(flips, np.zeros(400)) == pytest.approx(1.96 * 100 / 400, rel=1e-3)
    assert statistics.churn_floor(np.zeros(5), np.arange(5)) == 0
