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


def test_few_videos_have_no_interval_and_no_claim():
    """Whatever they say: of 9 videos that all gain, none of the tests can tell how many of another kind there are."""
    for videos in range(2, statistics.MIN_CLUSTERS):
        names = [str(i) for i in range(videos)]
        assert statistics.clustered_mean(np.arange(videos) % 2, names)[1:] == (None, None)
        difference = statistics.paired_difference(np.ones(videos), np.zeros(videos), names)
        assert difference.low is None and difference.inside_noise
        assert statistics.cluster_t_test(np.ones(videos), np.zeros(videos), names) == 1.0
    assert statistics.clustered_mean(np.arange(10) % 2, np.arange(10)).low is not None


def test_intervals_of_few_videos_are_as_wide_as_students():
    """Normal values: of 12 videos the interval is nearly that of t with 11 degrees of freedom."""
    rng, ratios = np.random.default_rng(0), []
    for _ in range(40):
        values = rng.normal(size=12)
        estimate = statistics.clustered_mean(values, np.arange(12))
        ratios.append((estimate.high - estimate.low) / (2 * 2.201 * values.std(ddof=1) / 12**0.5))
    assert np.mean(ratios) == pytest.approx(1.0, abs=0.05)


def test_p_values_are_not_below_the_sign_test():
    """12 videos, of which 9 gain a lot and 3 lose a little: 2 * (1 + 12 + 66 + 220) / 4096."""
    gains = np.array([5.0] * 9 + [-0.1] * 3)
    exact = 2 * (1 + 12 + 66 + 220) / 4096
    assert statistics.sign_test(gains, np.arange(12)) == pytest.approx(exact)
    assert statistics.paired_difference(gains, np.zeros(12), np.arange(12)).p_value == pytest.approx(exact)


def test_cluster_t_test_by_hand():
    """One value a video: the ordinary t test; t(15) of mean 0.5, deviation 1: 2.0 has p = 0.0639."""
    values = np.arange(16) - 7.5
    values = 0.5 + values / values.std(ddof=1)
    assert statistics.cluster_t_test(values, np.zeros(16), np.arange(16)) == pytest.approx(0.0639, abs=2e-4)
    assert statistics.cluster_t_test(np.ones(40), np.zeros(40), np.arange(40)) == pytest.approx(2 * 0.5**40)


def test_holm():
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]).tolist() == [True, False, False, True]
    assert statistics.holm([0.01, 0.02, 0.03]).tolist() == [True, True, True]
    assert statistics.holm([]).tolist() == [] and statistics.holm([0.2, 0.06]).tolist() == [False, False]


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
