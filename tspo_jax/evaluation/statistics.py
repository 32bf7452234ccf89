"""How sure an accuracy and a difference of two methods are.

Questions about one video are not independent, so intervals come from a bootstrap over videos (all questions of a
drawn video count), not over questions. A bootstrap of few videos is too narrow: below MIN_CLUSTERS there is no interval
and no claim, above them its percentiles are moved outwards as Student's t is to the normal distribution (Hesterberg,
"What Teachers Should Know About the Bootstrap", 2015, 5.3). `benchmarks/interval_coverage.py` measures what they cover.
All functions are pure; the seed is an argument.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import special

MIN_CLUSTERS = 10  # videos; fewer cannot give an interval that holds its level


class Estimate(NamedTuple):
    """A mean with its interval; `low` and `high` are None where the data cannot give one."""

    value: float
    low: float | None
    high: float | None


class Difference(NamedTuple):
    """Method a minus method b on the same questions. `p_value` is two-sided, of the paired bootstrap, and never below
    that of the sign test of the videos."""

    value: float
    low: float | None
    high: float | None
    p_value: float

    @property
    def inside_noise(self) -> bool:
        """Whether the interval contains 0 (or there is none): then no better method can be named."""
        return self.low is None or self.low <= 0 <= self.high


def clustered_mean(
    values: np.ndarray,
    clusters: Sequence[str],
    seed: int = 0,
    resamples: int = 10_000,
    level: float = 0.95,
    weights: np.ndarray | None = None,
) -> Estimate:
    """Mean of values [n] with the percentile interval of a bootstrap over clusters [n] (videos).

    With fewer than MIN_CLUSTERS there is no interval; `weights` [n] are those of the values, all the same by default.
    Raises ValueError without any value.
    """
    values = np.asarray(values, float)
    means = _bootstrap_means(values, clusters, seed, resamples, weights)
    return Estimate(float(np.average(values, weights=weights)), *_percentiles(means, len(set(clusters)), level))


def paired_difference(
    a: np.ndarray,
    b: np.ndarray,
    clusters: Sequence[str],
    seed: int = 0,
    resamples: int = 10_000,
    level: float = 0.95,
    weights: np.ndarray | None = None,
) -> Difference:
    """Mean of a - b over the same n questions, a [n] and b [n], with the bootstrap over clusters [n]."""
    difference = np.asarray(a, float) - np.asarray(b, float)
    means = _bootstrap_means(difference, clusters, seed, resamples, weights)
    # One is added to both counts so that no finite number of resamples claims p = 0.
    one_sided = min(np.sum(means <= 0), np.sum(means >= 0)) + 1 if len(means) else np.inf
    p_value = max(min(1.0, 2 * one_sided / (len(means) + 1)), sign_test(difference, clusters))
    value = float(np.average(difference, weights=weights))
    return Difference(value, *_percentiles(means, len(set(clusters)), level), float(p_value))


def sign_test(differences: np.ndarray, clusters: Sequence[str]) -> float:
    """Exact two-sided p-value: do videos that gain and videos that lose split evenly? differences and clusters [n]."""
    _, cluster = np.unique(np.asarray(clusters, str), return_inverse=True)
    sums = np.bincount(cluster, np.asarray(differences, float))
    gain, lose = int(np.sum(sums > 1e-12)), int(np.sum(sums < -1e-12))
    return min(1.0, 2 * float(special.bdtr(min(gain, lose), gain + lose, 0.5)))


def cluster_t_test(a: np.ndarray, b: np.ndarray, clusters: Sequence[str], weights: np.ndarray | None = None) -> float:
    """Two-sided p-value of a - b by Student's t over clusters, as fine as comparing many groups needs it: a bootstrap
    ends at 2 / (resamples + 1). 1 for fewer than MIN_CLUSTERS."""
    difference = np.asarray(a, float) - np.asarray(b, float)
    _, cluster = np.unique(np.asarray(clusters, str), return_inverse=True)
    count, weights = cluster.max() + 1, np.ones(len(difference)) if weights is None else weights
    if count < MIN_CLUSTERS:
        return 1.0
    mean = np.average(difference, weights=weights)
    deviations = np.bincount(cluster, weights * (difference - mean))
    error = np.sqrt(count / (count - 1) * np.sum(deviations**2)) / np.sum(weights)
    if error < 1e-12:  # the same in every video
        return sign_test(difference, clusters)
    return float(2 * special.stdtr(count - 1, -abs(mean) / error))


def holm(p_values: Sequence[float], level: float = 0.05) -> np.ndarray:
    """Which hypotheses Holm's procedure rejects, bool [n]: that any of the true ones is among them has at most the
    probability `level`, however the tests depend on each other."""
    p_values = np.asarray(p_values, float)
    order = np.argsort(p_values, kind="stable")
    passed = p_values[order] <= level / np.arange(len(p_values), 0, -1)
    rejected = np.zeros(len(p_values), bool)
    rejected[order[: len(passed) if passed.all() else int(np.argmin(passed))]] = True
    return rejected


def mcnemar(a: np.ndarray, b: np.ndarray) -> float:
    """Exact two-sided p-value of McNemar's test: do questions that only one of two methods gets right split evenly?

    a, b: bool [n], right or wrong on the same questions. It takes questions as independent; where several belong to
    one video `paired_difference` is the safer test.
    """
    a, b = np.asarray(a, bool), np.asarray(b, bool)
    only_a, only_b = int(np.sum(a & ~b)), int(np.sum(b & ~a))
    return min(1.0, 2 * float(special.bdtr(min(only_a, only_b), only_a + only_b, 0.5)))


def churn_floor(flips: np.ndarray, clusters: Sequence[str], level: float = 0.95) -> float:
    """The difference of two accuracies that chance reaches where so many answers flip without a reason.

    A change that carries no information (the order of the options) makes some right answers wrong and some wrong ones
    right. If each flip goes either way, the difference over n questions has the standard deviation
    sqrt(sum over videos of flips^2) / n, flips of one video going together.

    Args:
      flips: bool [n], whether a question's answer turned from right to wrong or back.
      clusters: videos [n].
      level: share of differences that stay below.

    Returns: absolute difference in [0, 1].
    """
    _, cluster = np.unique(np.asarray(clusters, str), return_inverse=True)
    together = np.bincount(cluster, np.asarray(flips, float))
    return float(special.ndtri((1 + level) / 2) * np.sqrt(np.sum(together**2)) / len(flips))


def over_seeds(values: Sequence[float], level: float = 0.95) -> Estimate:
    """Mean over training seeds with the interval of Student's t; one seed gives none."""
    values = np.asarray(values, float)
    mean = float(values.mean())
    if len(values) < 2:
        return Estimate(mean, None, None)
    half = special.stdtrit(len(values) - 1, (1 + level) / 2) * values.std(ddof=1) / np.sqrt(len(values))
    return Estimate(mean, float(mean - half), float(mean + half))


def _bootstrap_means(
    values: np.ndarray, clusters: Sequence[str], seed: int, resamples: int, weights: np.ndarray | None
) -> np.ndarray:
    """Means [resamples] of values whose clusters are drawn with replacement; empty for fewer than MIN_CLUSTERS."""
    if len(values) != len(clusters) or not len(values):
        raise ValueError(f"{len(values)} values and {len(clusters)} clusters: equally many, at least one, are needed")
    names, cluster = np.unique(np.asarray(clusters, str), return_inverse=True)
    if len(names) < MIN_CLUSTERS:
        return np.zeros(0)
    drawn = _drawn(len(names), seed, resamples)
    weights = np.ones(len(values)) if weights is None else weights
    return (drawn @ np.bincount(cluster, weights * values)) / (drawn @ np.bincount(cluster, weights))


@functools.lru_cache(maxsize=64)
def _drawn(num_clusters: int, seed: int, resamples: int) -> np.ndarray:
    """How often each cluster is drawn, uint16 [resamples, clusters].

    Drawing takes most of the time, and a summary asks for the same numbers of clusters for every method and budget.
    """
    rng = np.random.default_rng(seed)
    return rng.multinomial(num_clusters, np.full(num_clusters, 1 / num_clusters), size=resamples).astype(np.uint16)


def _percentiles(means: np.ndarray, num_clusters: int, level: float) -> tuple[float | None, float | None]:
    if not len(means):
        return None, None
    wide = np.sqrt(num_clusters / (num_clusters - 1)) * special.stdtrit(num_clusters - 1, (1 + level) / 2)
    low, high = np.quantile(means, [special.ndtr(-wide), special.ndtr(wide)])
    return float(low), float(high)
