"""A few simulations: where intervals are given, they cover, and equal methods are rarely called different."""

from benchmarks import interval_coverage
from tspo_jax.evaluation import results
from tspo_jax.evaluation.benchmarks import Item


def test_coverage():
    none = interval_coverage.coverage(5, 20, resamples=200)
    assert none["given"] == 0 and none["claimed"] == 0
    found = interval_coverage.coverage(20, 200, resamples=500)
    assert found["given"] == 1 and 0.9 <= found["covered"] <= 0.99 and found["claimed"] <= 0.1


def test_summaries_of_equal_methods():
    items = [
        Item(str(i), str(i // 2), "q", "q", ("x", "y"), "A", {"part": (str(i % 7),), "kind": (str(i % 5),)})
        for i in range(300)
    ]
    claims = 0
    for seed in range(6):
        summary = results.summarize(interval_coverage.simulated_rows(items, seed), ("topk", "aks"))
        claims += any(not row["inside_noise"] for row in summary["differences"])
    assert len(summary["differences"]) == 2 * 2 * 2 * 13 and claims <= 1
