import itertools
import json

import numpy as np
import pytest

from tspo_jax.selection import spans


@pytest.fixture(scope="module")
def released(golden):
    return np.load(golden / "lstp_span.npz")


def test_golden_pseudo_labels(released):
    sizes = {name.split("/")[1] for name in released.files if name.startswith("pseudo/")}
    for size in sizes:
        scores, steps = released[f"pseudo/{size}/scores"], released[f"pseudo/{size}/num_steps"]
        for i, row in enumerate(scores):
            span = spans.released_span(row)
            assert span == tuple(released[f"pseudo/{size}/minus_min"][i])
            assert spans.released_span(row, subtract_minimum=False) == tuple(released[f"pseudo/{size}/raw"][i])
            assert spans.to_steps(span, len(row), int(steps[i])) == tuple(released[f"pseudo/{size}/steps"][i])


@pytest.mark.parametrize("variant", spans.VARIANTS)
def test_golden_frames(released, variant):
    for i, expected in enumerate(released[f"frames/{variant}"]):
        num_steps, num_frames, k = (int(released[f"frames/{name}"][i]) for name in ("num_steps", "num_frames", "k"))
        draws = [tuple(map(int, draw)) for draw in released["frames/draws"][i]]
        frames = spans.released_frames(draws, num_steps, num_frames, k, variant)
        np.testing.assert_array_equal(frames, expected[:k])


def test_golden_unigram_recall(released):
    for case in json.loads(str(released["meta"]))["rouge"]:
        assert spans.unigram_recall(case["gold"], case["pred"]) == pytest.approx(case["score_alone"], abs=1e-12)


def brute_force(heights):
    """(area, end, width) of the best rectangle by looking at all."""
    rectangles = [
        (-(b - a + 1) * heights[a : b + 1].min(), b, b - a + 1)
        for a, b in itertools.combinations_with_replacement(range(len(heights)), 2)
    ]
    area, end, width = min(rectangles)
    return (end - width + 1, end) if area < 0 else None


def test_largest_rectangle_against_brute_force():
    """Few values, so that there are ties; of those the brute force sees rectangles that could be wider, too, which
    never are the largest."""
    rng = np.random.default_rng(0)
    for _ in range(2000):
        heights = rng.integers(0, 4, rng.integers(1, 12)).astype(float)
        assert spans.largest_rectangle(heights) == brute_force(heights)


def test_nothing_above_zero():
    assert spans.largest_rectangle(np.zeros(4)) is None
    assert spans.largest_rectangle(np.array([-1.0, -2.0])) is None
    assert spans.released_span(np.full(4, 0.5)) == (0, 3)
    assert spans.to_steps((0, 0), 1, 9) == (0, 8)


def test_evidence_span():
    scores = np.full(40, 0.25)
    scores[20:26] = 0.9
    assert spans.evidence_span(scores) == (20, 25)
    scores[22] = 0.3  # one frame among them that answered wrongly
    assert spans.evidence_span(scores) == (20, 25)
    scores[5] = 0.0
    assert spans.evidence_span(scores) == (20, 25)
    assert spans.evidence_span(np.full(7, 0.4)) is None
    assert spans.evidence_span(np.array([0.3])) is None
    alone = np.full(9, 0.2)
    alone[4] = 0.9  # evidence of one frame
    assert spans.evidence_span(alone) == (4, 4)


def test_best_span_against_brute_force():
    rng = np.random.default_rng(1)
    for _ in range(300):
        start, end = rng.normal(size=(2, rng.integers(1, 15)))
        first, last = spans.best_span(start, end)
        pairs = itertools.combinations_with_replacement(range(len(start)), 2)
        assert first <= last and start[first] + end[last] == max(start[a] + end[b] for a, b in pairs)


def test_best_span_leaves_padding_out():
    start, end = np.array([0.0, 3.0, -np.inf]), np.array([5.0, 1.0, -np.inf])
    assert spans.best_span(start, end) == (0, 0)


def test_frames_of_span():
    assert spans.frames_of_span((10, 17), 100, 4).tolist() == [10, 12, 14, 16]
    assert spans.frames_of_span((10, 12), 101, 5).tolist() == [0, 10, 11, 12, 100]
    assert spans.frames_of_span((0, 4), 5, 8).tolist() == [0, 1, 2, 3, 4]
    for first, last, k in ((0, 99, 16), (3, 40, 37), (7, 7, 1)):
        frames = spans.frames_of_span((first, last), 100, k)
        assert len(frames) == k and first <= frames[0] and frames[-1] <= last and (np.diff(frames) > 0).all()


def test_one_flow_step():
    """The original divides by zero."""
    for variant in spans.VARIANTS:
        assert spans.released_frames([(0, 0), (0, 0)], 1, 8, 4, variant).shape == (4,)
    with pytest.raises(ValueError, match="variant is 'scaled'"):
        spans.released_frames([(0, 0)], 1, 8, 4, "scaled")
