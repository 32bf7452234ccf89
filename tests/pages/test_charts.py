"""Places of lines, marks and labels in a chart."""

import numpy as np
import pytest

from tspo_jax.pages import charts


def test_smoothing_does_not_lag():
    line = np.arange(100.0)
    np.testing.assert_allclose(charts.smooth(line)[10:-10], line[10:-10])
    noise = np.random.default_rng(0).normal(size=1000)
    assert charts.smooth(noise).std() < 0.15
    np.testing.assert_allclose(charts.smooth([2.0, 4.0]), [3.0, 3.0])


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.31, 0.74), (3.2, 3.2), (-5, 1200), (0, 0), (1e-4, 3e-4)])
def test_ticks_are_few_and_hold_the_range(low, high):
    ticks = charts.ticks(low, high)
    assert 2 <= len(ticks) <= 6 and ticks[0] <= low and ticks[-1] >= high


def test_a_line_of_many_points_keeps_its_peaks():
    scores = np.random.default_rng(0).normal(size=36_000)
    scores[20_000] = 100
    chart = charts.over_time("Scores", np.arange(36_000.0), 36_000, [("agent", "topk", scores)], [])
    places = np.array([point.split(",") for point in chart.lines[0].points.split()], float)
    assert len(places) <= 2000 and np.all(np.diff(places[:, 0]) >= 0)
    peak = places[places[:, 1].argmin()]
    assert peak == pytest.approx([10 + 860 * 20_000 / 36_000, 8], abs=0.1), "the top of the chart, at its time"


def test_marks_lie_below_each_other_at_their_time():
    picks = [("uniform", "uniform", [0.0, 50.0, 100.0]), ("agent", "topk", [25.0])]
    chart = charts.over_time("S", np.arange(101.0), 100.0, [("a", "topk", np.arange(101.0))], picks, [(10.0, 20.0)])
    assert [(colour, x) for colour, x, _, _ in chart.marks] == [
        ("uniform", 10),
        ("uniform", 440),
        ("uniform", 870),
        ("topk", 225),
    ]
    heights = [y for _, _, y, _ in chart.marks]
    assert heights[0] == heights[2] < heights[3] < chart.height
    assert chart.spans == [(96.0, 86.0, "evidence 0:10.0 – 0:20.0")]
    assert [label.text for label in chart.columns] == ["0:00", "0:25", "0:50", "1:15", "1:40"]
