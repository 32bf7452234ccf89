import json

import numpy as np
import pytest

from tspo_jax.evaluation import temporal_search_metrics as metrics


@pytest.fixture(scope="module")
def haystack(golden):
    return json.loads((golden / "keyframe_haystack.json").read_text())


@pytest.fixture(scope="module")
def items(haystack):
    return [metrics.HaystackItem(i["fps"], i["gt_frame_index"], i["keyframe_timestamps"]) for i in haystack["items"]]


@pytest.mark.parametrize("variant", ["fixed", "before_fix"])
def test_golden_means(haystack, items, variant):
    for threshold, results in haystack["results"].items():
        means = metrics.released(items, float(threshold), whole_seconds=variant == "before_fix")
        for name, field in (("precision", "Precision"), ("recall", "Recall"), ("f1", "F1 Score")):
            expected = results[variant][f"Average Temporal {field}"]
            assert means[name] == pytest.approx(expected, abs=1e-12), (threshold, name)
    means = metrics.released(items, 5.0)
    np.testing.assert_allclose([means["annd_precision"], means["annd_recall"]], haystack["annd_mean"], atol=1e-10)


def test_golden_questions(haystack, items):
    thresholds = [float(t) for t in haystack["thresholds"]]
    for i, item in enumerate(items):
        moments = [(frame / item.fps, frame / item.fps) for frame in item.annotated]
        rows = metrics.agreement(np.array(item.chosen), moments, thresholds)
        expected = haystack["annd_precision_recall"][i]
        assert expected is None or [rows["annd_precision"], rows["annd_recall"]] == pytest.approx(expected, abs=1e-10)
        for t in thresholds:
            expected = haystack["results"][f"{t:g}"]["per_item_precision_recall_f1"][i]
            found = [rows.get(f"{name}@{t}") for name in ("precision", "recall", "f1")]
            if expected is None:
                assert not rows or found == [0, 0, 0]
            else:
                assert found == pytest.approx(expected, abs=1e-12)


def test_golden_ssim(golden, haystack):
    data = np.load(golden / "keyframe_haystack.npz")
    for i, case in enumerate(haystack["ssim"]):
        annotated, chosen = data[f"ssim{i}/gt"], data[f"ssim{i}/pred"]
        for name, rows_as_channels in (("released", True), ("channels", False)):
            matrix = metrics.ssim_matrix(annotated, chosen, rows_as_channels)
            np.testing.assert_allclose(matrix, data[f"ssim{i}/matrix_{name}"], atol=1e-5)
            means = metrics.ssim_agreement(matrix)
            expected = case[f"{name}_precision_recall"]
            np.testing.assert_allclose([means["ssim_precision"], means["ssim_recall"]], expected, atol=1e-5)


def test_spans():
    """A frame inside of an annotated span is at no distance; the nearest moment counts."""
    rows = metrics.agreement(np.array([5.0, 13.0, 40.0]), [(4.0, 6.0), (10.0, 12.0)], (0, 1, 2))
    assert [rows[f"precision@{t}"] for t in (0, 1, 2)] == pytest.approx([1 / 3, 2 / 3, 2 / 3])
    assert [rows[f"recall@{t}"] for t in (0, 1, 2)] == pytest.approx([1 / 2, 1, 1])
    assert rows["f1@1"] == pytest.approx(2 * (2 / 3) / (2 / 3 + 1))
    assert rows["annd_precision"] == pytest.approx(29 / 3) and rows["annd_recall"] == 0.5


def test_questions_without_frames_or_moments():
    assert metrics.agreement(np.array([1.0]), [], (5,)) == {}
    assert metrics.agreement(np.array([]), [(1, 2)], (5,)) == {"precision@5": 0.0, "recall@5": 0.0, "f1@5": 0.0}
    with pytest.raises(ValueError, match="no question has both"):
        metrics.released([metrics.HaystackItem(1.0, [], [2.0])], 5.0)


def test_ssim_of_other_sizes():
    with pytest.raises(ValueError, match="cannot be compared"):
        metrics.ssim(np.zeros((4, 4, 3), np.uint8), np.zeros((4, 5, 3), np.uint8))
